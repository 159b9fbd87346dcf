//! Passphrases and PINs: from a file, a descriptor or the terminal, and never from arguments or the environment.

use crate::cli::PassphraseArgs;
use crate::files::{self, Secrecy};
use crate::luks::unlock::{Passphrase, PassphraseFile};
use crate::plan::EnginePlan;
use crate::report::{Code, Failure};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_engine::Ask;
use inlinecrypt_engine::root::{PASSPHRASE_BYTES_MAX, Question, strip_line_feed};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use zeroize::Zeroizing;

/// The subcommand that talks to TPMs and tokens.
pub(crate) const HELPER: &str = "root-helper";

/// Answers the questions of one command. Who was asked once is not asked again for the same root; with this, everything
/// that was answered is wiped.
pub(crate) struct Asker {
    source: Source,
    /// What the config says about the engine whose root is asked for.
    of_engine: Option<PathBuf>,
    /// A key file for LUKS containers.
    key_file: Option<PathBuf>,
    /// What standard input was, if it was a key file.
    stdin: Option<Arc<Zeroizing<Vec<u8>>>>,
    given: HashMap<PathBuf, Zeroizing<Vec<u8>>>,
}

/// Where the command line says that passphrases are.
enum Source {
    Terminal,
    File(PathBuf),
    /// Nobody may be asked.
    Nobody,
    /// A descriptor gives what it has once, to the first who reads it.
    Descriptor(PathBuf, Option<Zeroizing<Vec<u8>>>),
}

impl Asker {
    pub(crate) fn new(args: &PassphraseArgs) -> Self {
        let PassphraseArgs { passphrase_file, passphrase_fd } = args;
        let source = match (passphrase_file, passphrase_fd) {
            (Some(path), _) => Source::File(path.clone()),
            (None, Some(number)) => Source::Descriptor(format!("/dev/fd/{number}").into(), None),
            (None, None) => Source::Terminal,
        };
        Self { source, of_engine: None, key_file: None, stdin: None, given: HashMap::new() }
    }

    /// The same, with a key file for LUKS containers.
    pub(crate) fn with_key_file(self, key_file: Option<PathBuf>) -> Self {
        Self { key_file, ..self }
    }

    /// The passphrase of the LUKS container with this header; `of_volume` is what a config names for it.
    pub(crate) fn luks(
        &mut self,
        header: &Path,
        of_volume: Option<&PassphraseFile>,
    ) -> Result<Passphrase, Failure> {
        let given = |bytes| Ok(Passphrase::Given(Arc::new(bytes)));
        if let Some(file) = of_volume {
            return Ok(Passphrase::File(file.clone()));
        }
        if self.key_file.as_deref() == Some(Path::new("-")) {
            // It gives what it has once.
            let bytes = match &self.stdin {
                Some(bytes) => bytes.clone(),
                None => Arc::new(files::read_stdin("key file", inlinecrypt_luks::PASSPHRASE_BYTES_MAX)?),
            };
            self.stdin = Some(bytes.clone());
            return Ok(Passphrase::Given(bytes));
        }
        if let Some(path) = &self.key_file {
            return Ok(Passphrase::File(PassphraseFile { path: path.clone(), whole: true }));
        }
        let own = |bytes: &Zeroizing<Vec<u8>>| Zeroizing::new(bytes.to_vec());
        match &mut self.source {
            Source::File(path) => Ok(Passphrase::File(PassphraseFile { path: path.clone(), whole: false })),
            Source::Nobody => Err(no_terminal(header)),
            Source::Descriptor(_, Some(bytes)) => given(own(bytes)),
            Source::Descriptor(path, kept) => {
                let bytes = PassphraseFile { path: path.clone(), whole: false }.read()?;
                given(own(kept.insert(bytes)))
            }
            Source::Terminal => {
                let question = format!("passphrase of {}: ", header.display());
                let typed = rpassword::prompt_password(question).map_err(|_why| no_terminal(header))?;
                given(Zeroizing::new(typed.into_bytes()))
            }
        }
    }

    /// A new passphrase for that container, typed twice if it is typed.
    pub(crate) fn new_luks(&mut self, header: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
        if self.key_file.is_some() || !matches!(self.source, Source::Terminal) {
            return match self.luks(header, None)? {
                Passphrase::File(file) => file.read(),
                Passphrase::Given(given) => Ok(Zeroizing::new(given.to_vec())),
                Passphrase::NotAsked(_) => Err(no_terminal(header)),
            };
        }
        let mut typed = ["", ", again"].into_iter().map(|again| {
            rpassword::prompt_password(format!("new passphrase of {}{again}: ", header.display()))
                .map(|typed| Zeroizing::new(typed.into_bytes()))
                .map_err(|_why| no_terminal(header))
        });
        let (first, second) = (typed.next().expect("two")?, typed.next().expect("two")?);
        if first != second {
            return Err(Failure::new(
                Code::Refused,
                format!("{}: both times something else was typed", header.display()),
                "Try again.",
            ));
        }
        Ok(first)
    }

    /// One for later, when nobody is there to be asked: it knows files, and nothing that was typed.
    pub(crate) fn without_people(&self, engine: &EnginePlan) -> Self {
        let source = match &self.source {
            Source::File(path) => Source::File(path.clone()),
            Source::Terminal | Source::Descriptor(..) | Source::Nobody => Source::Nobody,
        };
        Self {
            source,
            of_engine: engine.passphrase_file.clone(),
            key_file: None,
            stdin: None,
            given: HashMap::new(),
        }
    }

    /// The same, for the root of `engine`: its config may name a file.
    pub(crate) fn of(&mut self, engine: &EnginePlan) -> &mut Self {
        self.of_engine.clone_from(&engine.passphrase_file);
        self
    }
}

impl Ask for Asker {
    fn secret(&mut self, question: &Question<'_>) -> Result<Zeroizing<Vec<u8>>, Error> {
        let own = |bytes: &Zeroizing<Vec<u8>>| Zeroizing::new(bytes.to_vec());
        if let Some(path) = &self.of_engine {
            return read(path.clone());
        }
        match &mut self.source {
            Source::File(path) => read(path.clone()),
            Source::Nobody => Err(Error::new(ErrorKind::Permission, Op::Open)
                .detail(format!("{question}: it cannot be had again without asking; restart the server"))),
            Source::Descriptor(_, Some(given)) => Ok(own(given)),
            Source::Descriptor(path, given) => Ok(own(given.insert(read(path.clone())?))),
            Source::Terminal => {
                let path = question.spec.path();
                if let Some(given) = self.given.get(path).filter(|_| !question.is_new) {
                    return Ok(own(given));
                }
                let typed = type_in(question)?;
                self.given.insert(path.to_owned(), own(&typed));
                Ok(typed)
            }
        }
    }

    fn helper(&mut self) -> Result<Command, Error> {
        // This very program, even if another lies under its name by now.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("inlinecrypt").arg(HELPER);
        Ok(command)
    }
}

/// Shows nothing that was answered.
impl fmt::Debug for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.source {
            Source::Terminal => "Asker(terminal)",
            Source::File(_) => "Asker(file)",
            Source::Nobody => "Asker(nobody)",
            Source::Descriptor(..) => "Asker(descriptor)",
        })
    }
}

fn read(path: PathBuf) -> Result<Zeroizing<Vec<u8>>, Error> {
    let mut bytes = files::read(&path, "passphrase file", Secrecy::Secret, PASSPHRASE_BYTES_MAX).map_err(
        |Failure { code, what, advice }| {
            let kind = match code {
                Code::Refused => ErrorKind::Permission,
                _ => ErrorKind::NotFound,
            };
            Error::new(kind, Op::Open).detail(format!("{what}; {advice}"))
        },
    )?;
    strip_line_feed(&mut bytes);
    Ok(bytes)
}

fn no_terminal(header: &Path) -> Failure {
    Failure::new(
        Code::Refused,
        format!("{} asks for a passphrase, and there is no terminal to type it in", header.display()),
        "Give it with --passphrase-file FILE, --passphrase-fd N or --key-file FILE.",
    )
}

fn type_in(question: &Question<'_>) -> Result<Zeroizing<Vec<u8>>, Error> {
    let prompt = |text: String| {
        let typed = rpassword::prompt_password(text).map_err(|why: io::Error| {
            Error::new(ErrorKind::Permission, Op::Open)
                .detail(format!(
                    "{question}: there is no terminal to type it in; give it with --passphrase-file FILE or \
                 --passphrase-fd N"
                ))
                .because(why)
        })?;
        Ok::<_, Error>(Zeroizing::new(typed.into_bytes()))
    };
    let typed = prompt(format!("{question}: "))?;
    if question.is_new && prompt(format!("{question}, again: "))? != typed {
        let why = format!("{question}: both times something else was typed; try again");
        return Err(Error::new(ErrorKind::Permission, Op::Open).detail(why));
    }
    Ok(typed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use inlinecrypt_engine::RootSpec;
    use inlinecrypt_engine::root::Keeper;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_gives_a_passphrase_without_its_line_feed_if_nobody_else_can_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p");
        fs::write(&path, b"word \n").unwrap();
        let spec = RootSpec::Passphrase("r".into());
        let question = Question { keeper: Keeper::Passphrase, spec: &spec, is_new: false };
        let mut asker =
            Asker::new(&PassphraseArgs { passphrase_file: Some(path.clone()), passphrase_fd: None });
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(**asker.secret(&question).unwrap(), *b"word ");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(asker.secret(&question).unwrap_err().kind(), ErrorKind::Permission);
        assert_eq!(format!("{asker:?}"), "Asker(file)");
    }
}
