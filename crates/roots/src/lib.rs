//! Roots that a TPM 2.0 or a PKCS#11 token keeps.
//!
//! ```text
//!   whoever opens a root --Request--> serve, in a process of its own --Answer--> whoever uses it (the engine)
//!                                       |- tpm2     speaks to the TPM itself: no library of others
//!                                       `- pkcs11   loads the module that the URI names
//! ```
//!
//! - The process lives for one request: what a module of others does to it ends with it. It never sees a volume's key.
//! - What goes wrong is told in the answer, with its kind; nothing is printed.
//! - What was wrapped is opened again before it is answered.
//!
//! Start reading at [`serve`]; the messages are in [`inlinecrypt_engine::root::helper`].
#![forbid(unsafe_code)]

mod pkcs11;
mod tpm2;

use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_engine::RootSpec;
use inlinecrypt_engine::root::helper::{Answer, Request, Task};
use inlinecrypt_engine::root::{Container, Keeper, Secret};
use std::io::{Read, Write};
use zeroize::Zeroizing;

/// Reads one request, does it, and answers.
///
/// # Errors
///
/// The system's, if the answer could not be written. Whatever else went wrong stands in the answer.
///
/// # Blocking
///
/// Waits for the TPM or token.
pub fn serve(mut stream: impl Read + Write) -> std::io::Result<()> {
    let answer = Request::receive(&mut stream).and_then(|request| answer(&request));
    Answer::send(&answer, &mut stream)
}

fn answer(request: &Request) -> Result<Answer, Error> {
    let Request { spec, pin, task } = request;
    let pin = pin.as_ref().map(|pin| &pin[..]);
    match (spec, task) {
        (RootSpec::Tpm2(spec), Task::Open(container)) => {
            tpm2::open(spec, pin, &container.body).map(Answer::Opened)
        }
        (RootSpec::Tpm2(spec), Task::Wrap(secret)) => {
            let body = tpm2::wrap(spec, pin, secret)?;
            same(&tpm2::open(spec, pin, &body)?, secret)?;
            Ok(Answer::Wrapped { asks: spec.pin, body })
        }
        (RootSpec::Pkcs11(spec), Task::Open(container)) => {
            pkcs11::open(spec, pin, &container.body).map(Answer::Opened)
        }
        (RootSpec::Pkcs11(spec), Task::Wrap(secret)) => {
            let wrapped = pkcs11::wrap(spec, pin, secret)?;
            same(&wrapped.opened, secret)?;
            Ok(Answer::Wrapped { asks: wrapped.asks, body: wrapped.body })
        }
        (RootSpec::File(_) | RootSpec::Passphrase(_), _) => {
            Err(Error::new(ErrorKind::Bug, Op::Open).detail("a root that needs no helper"))
        }
    }
}

fn same(opened: &Secret, secret: &Secret) -> Result<(), Error> {
    if ***opened == ***secret {
        Ok(())
    } else {
        let why = "what it wrapped opens to something else; it cannot keep a root";
        Err(Error::new(ErrorKind::EngineFailed, Op::Create).detail(why))
    }
}

/// What `container` says about how it is wrapped, as names and values for people. Needs neither TPM nor token.
#[must_use]
pub fn describe(container: &Container) -> Vec<(&'static str, String)> {
    match container.keeper {
        Keeper::Tpm2 => tpm2::describe(&container.body),
        Keeper::Pkcs11 => pkcs11::describe(&container.body),
        Keeper::Passphrase => Vec::new(),
    }
}

fn fail(kind: ErrorKind, why: impl Into<String>) -> Error {
    Error::new(kind, Op::Open).detail(why.into())
}

fn secret_from(bytes: &[u8]) -> Option<Secret> {
    let mut secret = Box::new(Zeroizing::new([0; 32]));
    if bytes.len() != secret.len() {
        return None;
    }
    secret.copy_from_slice(bytes);
    Some(secret)
}
