//! The least that any server on a socket does: as many bytes come and go as with NBD, and nobody looks at them.

use super::client::{Done, Shape, Way};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

/// Most that is received or sent at once.
const MOVE_BYTES: usize = 256 * 1024;
/// Room in the socket for replies: what the server gives a busy client.
const SEND_ROOM_BYTES: usize = 2 * 1024 * 1024;

/// Keeps messages of the lengths of `shape` under way for `time`, as the client does, with a thread at the other end
/// that answers each.
pub(super) fn run(shape: Shape, way: Way, time: Duration) -> io::Result<Done> {
    let (ours, theirs) = UnixStream::pair()?;
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&theirs, SEND_ROOM_BYTES);
    let (request, reply) = shape.message_bytes(way);
    thread::scope(|scope| {
        let echo = thread::Builder::new().name("bench-echo".to_owned());
        let echo = echo.spawn_scoped(scope, move || answer(theirs, request, reply))?;
        let done = ask(&ours, shape, request, reply, time);
        // It ends with the stream.
        drop(ours);
        let answered = echo.join().unwrap_or_else(|_panic| Err(io::Error::other("it has panicked")));
        answered.and(done)
    })
}

fn ask(stream: &UnixStream, shape: Shape, request: usize, reply: usize, time: Duration) -> io::Result<Done> {
    let began = Instant::now();
    let until = began + time;
    let message = vec![0; request];
    let mut room = vec![0; MOVE_BYTES];
    let (mut sent, mut done, mut came, mut is_over) = (0u64, 0u64, 0usize, false);
    loop {
        let free = if is_over { 0 } else { shape.depth as u64 - (sent - done) };
        sent += free;
        let mut parts: Vec<IoSlice<'_>> = (0..free).map(|_| IoSlice::new(&message)).collect();
        send_all(stream, &mut parts)?;
        if sent == done {
            return Ok(Done { requests: done, seconds: began.elapsed().as_secs_f64() });
        }
        came += receive(stream, &mut room)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        done += (came / reply) as u64;
        came %= reply;
        is_over = Instant::now() >= until;
    }
}

fn answer(stream: UnixStream, request: usize, reply: usize) -> io::Result<()> {
    let message = vec![0; reply];
    let mut room = vec![0; MOVE_BYTES];
    let mut came = 0;
    while let Some(more) = receive(&stream, &mut room)? {
        came += more;
        let mut parts: Vec<IoSlice<'_>> = (0..came / request).map(|_| IoSlice::new(&message)).collect();
        came %= request;
        send_all(&stream, &mut parts)?;
    }
    Ok(())
}

/// Receives once; `None` at the end.
fn receive(mut stream: &UnixStream, room: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match stream.read(room) {
            Ok(0) => return Ok(None),
            Ok(came) => return Ok(Some(came)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sends all parts, by as few system calls as it takes.
pub(super) fn send_all(mut stream: &UnixStream, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    let mut rest = parts;
    // Empty ones in front are none.
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match stream.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut rest, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
