//! Engine processes that a service starts for several servers.

use crate::clients::fio;
use crate::rig::{PATIENCE, Place, Server, eventually, run, run_to_fail};
use inlinecrypt_testkit::{ServerProcess, require_tool};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;

/// A service at `engine.sock` of a place.
fn service(place: &Place) -> ServerProcess {
    service_with(place, &[])
}

/// The same with more arguments.
pub(crate) fn service_with(place: &Place, more: &[&str]) -> ServerProcess {
    let mut command = place.command();
    command.args(["-v", "engine", "serve", "--listen", "unix:engine.sock"]).args(more);
    start(place, &mut command)
}

/// Starts a service at a place and waits until it serves.
pub(crate) fn start(place: &Place, command: &mut Command) -> ServerProcess {
    let log = File::options().create(true).append(true).open(place.path("service.log")).unwrap();
    command.stderr(log).stdout(File::create(place.path("service.out")).unwrap());
    let process = ServerProcess::start(command).unwrap();
    eventually("the service serves", || {
        fs::read_to_string(place.path("service.out")).unwrap().contains("--engine-process unix:")
    });
    process
}

/// A server at another place that has its engines from the service there.
fn served(place: &Place, at: &Path) -> Server {
    place.serve(["--engine-process", &format!("unix:{}", at.display()), "--create", "24MiB", "v.img"])
}

/// Number of the engine process, and how often it was started again.
fn engine(server: &Server, place: &Place) -> (Option<u64>, u64) {
    let status = server.status(place);
    let process = &status["servers"][0]["engines"][0]["process"];
    (process["pid"].as_u64(), process["restarts"].as_u64().unwrap())
}

fn signal(pid: u64, signal: Signal) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn two_servers_share_a_service_and_one_loses_its_engine_process_under_fio() {
    let Some(program) = require_tool("fio") else { return };
    let (home, first, second) = (Place::new(), Place::new(), Place::new());
    let mut service = service(&home);
    let socket = home.path("engine.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let servers = [(&first, served(&first, &socket)), (&second, served(&second, &socket))];
    let [victim, bystander] =
        [&servers[0], &servers[1]].map(|(place, server)| engine(server, place).0.unwrap());
    assert_ne!(victim, bystander);
    thread::scope(|scope| {
        let runs = servers.each_ref().map(|(place, server)| {
            let mut fio = fio(&program, place, &server.uri("v"), "512", &["--do_verify=1", "--rate=8m"]);
            scope.spawn(move || run(&mut fio))
        });
        let written = |(place, server): &(&Place, Server)| {
            server.status(place)["servers"][0]["volumes"][0]["counters"]["write"]["bytes"].as_u64().unwrap()
        };
        eventually("both are written to", || servers.iter().all(|server| written(server) > 1 << 20));
        signal(victim, Signal::KILL);
        for said in runs {
            let said = said.join().unwrap();
            assert!(said.matches("err= 0").count() == 1 && !said.contains("verify:"), "{said}");
        }
    });
    let now = servers.each_ref().map(|(place, server)| engine(server, place));
    assert!(now[0].0.is_some_and(|pid| pid != victim) && now[0].1 == 1, "{now:?}");
    assert_eq!(now[1], (Some(bystander), 0));

    // Told to stop, it lets nobody in and waits for those that it serves.
    signal(service.pid().into(), Signal::TERM);
    eventually("its socket is gone", || !socket.exists());
    let said = run_to_fail(third(&first, &socket).arg("other.img"));
    assert!(said.contains("no engine service answers at"), "{said}");
    let [(_, one), (_, other)] = servers;
    one.client("v").write(0, &[1; 4096]).unwrap();
    one.stop();
    assert!(service.child().try_wait().unwrap().is_none(), "another server still runs");
    other.client("v").write(0, &[1; 4096]).unwrap();
    other.stop();
    assert!(service.wait(PATIENCE).unwrap().success());
    let log = fs::read_to_string(home.path("service.log")).unwrap();
    assert!(log.contains("stopping once 2 engine processes have ended"), "{log}");
}

fn third(place: &Place, socket: &Path) -> Command {
    let mut command = place.command();
    command.args(["serve", "--create", "1MiB"]).arg(format!("--engine-process=unix:{}", socket.display()));
    command
}

#[test]
fn a_service_has_its_name_alone_and_takes_it_over_from_one_that_was_killed() {
    let (home, place) = (Place::new(), Place::new());
    let mut killed = service(&home);
    let said = run_to_fail(home.command().args(["engine", "serve", "--listen", "unix:engine.sock"]));
    assert!(said.contains(&format!("process {}", killed.pid())) && said.contains("listens there"), "{said}");
    let said = run_to_fail(home.command().args(["engine", "serve", "--listen", "tcp:127.0.0.1:0"]));
    assert!(said.contains("cannot listen on tcp:127.0.0.1:0"), "{said}");

    let server = served(&place, &home.path("engine.sock"));
    let process = engine(&server, &place).0.unwrap();
    killed.kill().unwrap();
    // No engine process outlives its service.
    eventually("its engine process ended", || !Path::new(&format!("/proc/{process}")).exists());
    assert!(home.path("engine.sock").exists(), "nobody removed it");
    let _again = service(&home);
    let other = Place::new();
    let other_server = served(&other, &home.path("engine.sock"));
    other_server.client("v").write(0, &[1; 4096]).unwrap();
    other_server.stop();
}
