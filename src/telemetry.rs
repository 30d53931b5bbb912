//! The log: `tracing` events as lines on stderr, as text or JSON. Lines about a request carry its id, because
//! each request runs in a span that `rpc` opens. Started once by `daemon`.
//!
//! Nothing that happens to stderr reaches those who log: a line that cannot be written (the disk is full, the
//! reader is gone, or does not read) is lost, and the next one that can be written says how many were.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Bytes that never block a pipe that says it can be written: the least that POSIX allows for PIPE_BUF.
const PIECE_BYTES: usize = 512;

/// Installs the log for the process. A second call has no effect: tests run many daemons in one process.
///
/// # Errors
/// The reason why `filter` is invalid.
pub fn start(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("log_filter: {error}"))?;
    let lines = Arc::new(Mutex::new(Lines::new(match format {
        LogFormat::Text => text_note,
        LogFormat::Json => json_note,
    })));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || Stderr(Arc::clone(&lines)))
        // It would print its own failures, and panic where that fails.
        .log_internal_errors(false)
        .with_target(false);
    let started = match format {
        LogFormat::Text => log.with_ansi(stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    // Fails only if a log is installed already.
    drop(started);
    Ok(())
}

/// Prints `text` on stdout, if somebody can read it.
pub fn announce(text: &str) {
    #[allow(clippy::disallowed_methods, reason = "a failure is ignored")]
    let mut stdout = io::stdout();
    drop(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()));
}

fn text_note(lost: u64) -> String {
    format!("{lost} lines of the log were lost\n")
}

fn json_note(lost: u64) -> String {
    format!("{{\"level\":\"WARN\",\"message\":\"lines of the log were lost\",\"count\":{lost}}}\n")
}

/// What became of the lines so far.
struct Lines {
    /// Number of lines lost since the last one that was written.
    lost: u64,
    /// The last line was cut short.
    torn: bool,
    /// Words the number of lost lines.
    note: fn(u64) -> String,
}

/// A writer of one line.
struct Stderr(Arc<Mutex<Lines>>);

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.append(&mut stderr(), can_write, line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    const fn new(note: fn(u64) -> String) -> Self {
        Self { lost: 0, torn: false, note }
    }

    /// Writes a line while `ready` says that `out` takes [`PIECE_BYTES`] without blocking.
    fn append<W: Write>(&mut self, out: &mut W, ready: impl Fn(&W) -> bool, line: &[u8]) {
        let mut begin = if self.torn { "\n".to_owned() } else { String::new() };
        if self.lost > 0 {
            begin += &(self.note)(self.lost);
        }
        if self.put(out, &ready, begin.as_bytes()) {
            self.lost = 0;
            if self.put(out, &ready, line) {
                return;
            }
        }
        self.lost += 1;
    }

    /// Returns whether all bytes were written.
    fn put<W: Write>(&mut self, out: &mut W, ready: impl Fn(&W) -> bool, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            let piece = &rest[..rest.len().min(PIECE_BYTES)];
            let written = if ready(out) { out.write(piece) } else { Ok(0) };
            match written {
                Ok(0) => return false,
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return false,
            }
            self.torn = !rest.is_empty();
        }
        true
    }
}

#[allow(clippy::disallowed_methods, reason = "a failure is a lost line")]
fn stderr() -> io::Stderr {
    io::stderr()
}

/// Returns false only if a write would block; a stream that cannot be asked is written to.
fn can_write(stream: &impl AsFd) -> bool {
    let mut streams = [PollFd::new(stream, PollFlags::OUT)];
    !matches!(poll(&mut streams, Some(&Timespec::default())), Ok(0))
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Read, pipe};

    use super::*;

    fn fresh() -> Lines {
        Lines::new(|count| format!("lost {count}\n"))
    }

    /// Takes `room` bytes, then fails.
    struct Disk {
        room: usize,
        text: Vec<u8>,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.room);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= taken;
            self.text.extend(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_on_a_full_disk_are_lost_and_counted() {
        let (mut lines, mut disk) = (fresh(), Disk { room: 9, text: vec![] });
        for line in ["first\n", "second\n", "third\n"] {
            lines.append(&mut disk, |_| true, line.as_bytes());
        }
        disk.room = 100;
        lines.append(&mut disk, |_| true, b"fourth\n");
        lines.append(&mut disk, |_| true, b"fifth\n");
        assert_eq!(String::from_utf8(disk.text).unwrap(), "first\nsec\nlost 2\nfourth\nfifth\n");
    }

    #[test]
    fn a_reader_that_does_not_read_or_is_gone_blocks_nobody() {
        let (mut reader, mut writer): (PipeReader, PipeWriter) = pipe().unwrap();
        let mut lines = fresh();
        while lines.lost == 0 {
            lines.append(&mut writer, can_write, &[b'x'; 3000]);
        }
        let mut read = vec![0; 1 << 13];
        reader.read_exact(&mut read).unwrap();
        lines.append(&mut writer, can_write, b"\nagain\n");
        assert_eq!(lines.lost, 0);
        drop(reader);
        lines.append(&mut writer, can_write, b"nobody reads this\n");
        assert_eq!(lines.lost, 1);
    }
}
