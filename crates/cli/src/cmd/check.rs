//! `check CONFIG`: whether all of a config can be served. Opens nothing for writing and changes nothing.

use crate::ask::Asker;
use crate::cli::Check;
use crate::host::{self, Host};
use crate::plain::ReadyPlain;
use crate::plan::{self, EnginePlan, Plan};
use crate::report::{Failures, print};
use crate::size::Size;
use inlinecrypt_core::admission::ServedBy;
use inlinecrypt_core::volume::IvLayout;
use std::fmt::Write as _;

pub(super) fn run(args: &Check) -> Result<(), Failures> {
    // Engines are tried in this process: what is proven holds wherever they run.
    let (plan, mut failures) = match Plan::for_what_can_be(&args.config) {
        Ok((mut plan, mut failures)) => {
            for engine in &plan.engines {
                match plan::check_realtime_home(engine) {
                    Ok(()) => tell_of_priority(engine),
                    Err(failure) => failures.push(failure),
                }
            }
            plan.engines.iter_mut().for_each(|engine| engine.home = None);
            (plan, failures)
        }
        Err(failures) => return Failures::check(failures),
    };
    plan.listen.check(&mut failures);
    failures.extend(plan.listen.places.iter().filter_map(plan::check_place));
    if failures.is_empty() {
        failures.extend(host::tls(&plan.listen.tls).err());
    }
    let (host, more) = Host::prepare(&plan, &mut Asker::new(&args.passphrase));
    failures.extend(more);
    host.tell_notes();
    Failures::check(failures)?;
    let mut text = format!("{} can be served:\n", args.config.display());
    for volume in &host.volumes {
        let by = match volume.admission.served_by() {
            ServedBy::Engine => format!("engine {}", plan.engines[volume.plan.engine].name),
            ServedBy::Fallback => "software fallback".to_owned(),
        };
        let _ = writeln!(
            text,
            "  {:?}: {}, {}, {}, data unit {}, key {}, by {by}",
            volume.plan.name,
            volume.plan.path.display(),
            Size(volume.layout.size_bytes()),
            volume.layout.mode(),
            volume.layout.data_unit_size(),
            volume.identifier,
        );
        if volume.layout.iv() != IvLayout::default() {
            let _ = writeln!(text, "    IV layout {}", volume.layout.iv());
        }
        if volume.plan.layout.offset != 0 {
            let _ = writeln!(text, "    from {} on", Size(volume.plan.layout.offset));
        }
        if let Some(next) = &volume.next {
            let _ = writeln!(
                text,
                "    being re-encrypted: {} of {} done, to {}, data unit {}, key {}",
                Size(next.plan.done_bytes),
                Size(next.plan.size_bytes),
                next.layout.mode(),
                next.layout.data_unit_size(),
                next.identifier,
            );
        }
    }
    for ReadyPlain { plan, len_bytes, .. } in &host.plain {
        let _ = writeln!(
            text,
            "  {:?}: {}, {}, PLAIN: not encrypted",
            plan.name,
            plan.path.display(),
            Size(*len_bytes)
        );
    }
    print(&text)?;
    Ok(())
}

/// What keeps an engine from real-time priority if whoever runs this starts the server: others may have the right to it.
fn tell_of_priority(engine: &EnginePlan) {
    if let Err(failure) = plan::check_realtime(engine) {
        failure.tell_as_note("if you start the server it is refused, which others may be allowed");
    }
}
