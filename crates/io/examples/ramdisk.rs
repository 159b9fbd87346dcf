//! The smallest embedding: a disk in memory, served over NBD on a Unix socket.
//!
//! ```text
//! cargo run --release -p inlinecrypt-io --example ramdisk -- /tmp/ram.sock [MiB [WORKERS]]
//! nbdinfo 'nbd+unix:///?socket=/tmp/ram.sock'
//! ```

use inlinecrypt_io::export::ExportSpec;
use inlinecrypt_io::export::nbd::{NbdServer, ServerOptions};
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::listen::{Listen, ListenOptions, Listener};
use std::error::Error;
use std::sync::Arc;
use std::{env, thread};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let path = args.next().ok_or("usage: ramdisk SOCKET [MiB [WORKERS]]")?;
    let mib: u64 = args.next().map_or(Ok(64), |text| text.parse())?;
    let workers: usize = args.next().map_or(Ok(0), |text| text.parse())?;

    let export = ExportSpec {
        name: "ram".to_owned(),
        description: "forgotten when the server ends".to_owned(),
        disk: Arc::new(RamDisk::new(mib << 20)),
    };
    let server =
        NbdServer::new([export], ServerOptions { workers: Some(workers), ..ServerOptions::default() })?;
    server.listen(Listener::bind(&Listen::Unix(path.clone().into()), ListenOptions::default())?)?;
    println!("serving {mib} MiB on {path} until killed");
    loop {
        thread::park();
    }
}
