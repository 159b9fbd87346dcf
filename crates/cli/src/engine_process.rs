//! Where engines run: in a process of their own, in an engine service's, or in this one.

use crate::ask::Asker;
use crate::plan::EnginePlan;
use inlinecrypt_core::engine::Engine;
use inlinecrypt_core::error::Error;
use inlinecrypt_engine::isolated::client::RootGiver;
use inlinecrypt_engine::isolated::{
    self, Isolated, LanePriority, Launcher, Options, ProcessLauncher, SocketLauncher,
};
use inlinecrypt_engine::{EngineSpec, Root, RootMaterial, WrappingKeyId};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

/// In which process an engine runs. Written `own`, `none` or `unix:PATH`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum EngineHome {
    /// One of its own, which this one starts and nobody else can look into.
    #[default]
    Own,
    /// This one: faster to start and easier to debug, and whoever reads its memory reads keys.
    None,
    /// One that an engine service starts.
    Service(PathBuf),
}

impl EngineHome {
    /// The same, with paths relative to `base`.
    pub(crate) fn relative_to(self, base: &Path) -> Self {
        match self {
            Self::Service(path) => Self::Service(crate::places::relative_to(base, &path)),
            other => other,
        }
    }
}

impl fmt::Display for EngineHome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("own"),
            Self::None => f.write_str("none"),
            Self::Service(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for EngineHome {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("unix:")) {
            ("own", _) => Ok(Self::Own),
            ("none", _) => Ok(Self::None),
            (_, Some(path)) if !path.is_empty() => Ok(Self::Service(path.into())),
            _ => Err(format!(
                "{text:?} is no place for an engine: own (a process of its own), none (the serving process), or unix:PATH (an \
                 engine service)"
            )),
        }
    }
}

/// Engines that were started, whichever process they are in.
pub(crate) struct Started {
    pub(crate) engine: Arc<dyn Engine>,
    /// Software for raw keys that the engine does not serve, if that was asked for.
    pub(crate) fallback: Option<Arc<dyn Engine>>,
    pub(crate) root: Option<WrappingKeyId>,
    /// Tells of restarts.
    pub(crate) isolated: Option<Arc<isolated::IsolatedEngine>>,
}

/// Starts the engine of `plan` where it shall run; with its root, if keys are wrapped under it, and with the engine of
/// `fallback` beside it, if that is wanted.
pub(crate) fn start(
    plan: &EnginePlan,
    wants_root: bool,
    fallback: Option<EngineSpec>,
    asker: &mut Asker,
) -> Result<Started, Error> {
    let material = wants_root.then(|| plan.root.gather(asker.of(plan))).transpose()?;
    let launcher: Arc<dyn Launcher> = match plan.home.as_ref().unwrap_or(&EngineHome::None) {
        EngineHome::None => {
            let root = material.map(Root::from_material).transpose()?;
            return Ok(Started {
                engine: inlinecrypt_engine::open(&plan.spec, root.as_ref())?,
                fallback: fallback.map(|spec| inlinecrypt_engine::open(&spec, None)).transpose()?,
                root: root.map(|root| root.id()),
                isolated: None,
            });
        }
        EngineHome::Own => Arc::new(ProcessLauncher::this_program()),
        EngineHome::Service(path) => Arc::new(SocketLauncher { path: path.clone() }),
    };
    let root = material.map(|material| giver(material, plan, asker));
    let options = Options {
        fallback: fallback.map(|spec| spec.to_string()),
        require_sandbox: plan.require_sandbox,
        priority: if plan.realtime { LanePriority::Realtime } else { LanePriority::Usual },
        deaths_max: plan.deaths_max,
        ..Options::new(plan.spec.to_string())
    };
    let Isolated { engine, fallback, root } = isolated::start(launcher, root, options)?;
    Ok(Started {
        engine: engine.clone(),
        fallback: fallback.map(|fallback| fallback as Arc<dyn Engine>),
        root,
        isolated: Some(engine),
    })
}

/// Gives `material` to the first engine process; to later ones what can be had without asking anybody.
fn giver(material: RootMaterial, plan: &EnginePlan, asker: &Asker) -> Arc<RootGiver> {
    let first = Mutex::new(Some(material));
    let (root, again) = (plan.root.clone(), Mutex::new(asker.without_people(plan)));
    Arc::new(move || match first.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(material) => Ok(material),
        None => root.gather(&mut *again.lock().unwrap_or_else(PoisonError::into_inner)),
    })
}
