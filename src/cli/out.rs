//! What commands write: data to stdout, notes for people to stderr. A stream that another process made
//! non-blocking (a shared terminal, a pipe of Node's) is waited for. A note that cannot be written is lost;
//! the command goes on.

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Writes data to stdout, at once.
pub(crate) fn data(text: &str) -> io::Result<()> {
    bytes(text.as_bytes())
}

/// Writes bytes to stdout, at once.
#[allow(clippy::disallowed_methods, reason = "the door to stdout; nothing else buffers there")]
pub(crate) fn bytes(bytes: &[u8]) -> io::Result<()> {
    write(&io::stdout(), bytes)
}

/// Writes a note to stderr.
#[allow(clippy::disallowed_methods, reason = "the door to stderr")]
pub(crate) fn note(text: &str) {
    // There is no other place to say that stderr cannot be written.
    drop(write(&io::stderr(), text.as_bytes()));
}

/// Returns whether notes go to a terminal.
#[allow(clippy::disallowed_methods, reason = "asked, not written")]
pub(crate) fn notes_are_watched() -> bool {
    io::stderr().is_terminal()
}

fn write(stream: &impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(stream, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(stream, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, pipe};

    use rustix::fs::{OFlags, fcntl_setfl};

    use super::*;

    #[test]
    fn a_full_non_blocking_pipe_is_waited_for() {
        let (mut reader, writer) = pipe().unwrap();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let sent = vec![b'x'; 1 << 20];
        let received = std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let mut received = Vec::new();
                reader.read_to_end(&mut received).map(|_| received)
            });
            write(&writer, &sent).unwrap();
            drop(writer);
            reading.join().unwrap().unwrap()
        });
        assert!(received == sent);
    }

    #[test]
    fn a_reader_that_left_is_an_error() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        assert_eq!(write(&writer, b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
