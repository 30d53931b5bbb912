//! `mlxd sessions export` and `import`: a session as one file.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use mlxd_client::Client;
use mlxd_client::v1::{ExportSessionRequest, ImportStart, Session, export_session_response::Event};

use super::failure::{Failure, Result};
use super::out;

/// Bytes that are read of a file, and sent, at once.
const CHUNK_BYTES: usize = 64 << 10;

#[derive(Args, Debug)]
pub(crate) struct ImportArgs {
    /// File
    file: PathBuf,
    /// Name of the session [default: the one that it was exported from]
    #[arg(long = "as", value_name = "NAME", default_value = "")]
    name: String,
    /// Model to bind it to [default: the one that it was bound to]
    #[arg(short, long, value_name = "MODEL", default_value = "")]
    model: String,
    /// Take the place of the session of that name, if there is one
    #[arg(long)]
    replace: bool,
}

/// Writes a session to a file. It gets its name when it is whole.
pub(crate) async fn export(client: &Client, name: String, path: &Path) -> Result<()> {
    let request = ExportSessionRequest { name, ..ExportSessionRequest::default() };
    let mut stream = client.export_session(request).await?;
    let mut target = Target::new(path).map_err(|error| of_file(path, &error))?;
    while let Some(event) = stream.next_event().await? {
        match event {
            Event::Chunk(bytes) => target.write(&bytes).map_err(|error| of_file(path, &error))?,
            Event::Finished(_) => {}
        }
    }
    target.finish(path).map_err(|error| of_file(path, &error))
}

/// Where an export is written to.
enum Target {
    Stdout,
    File(Part),
}

/// A file that is not whole yet; it goes unless it gets its name.
struct Part {
    file: File,
    path: PathBuf,
}

impl Target {
    fn new(path: &Path) -> io::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdout);
        }
        let mut part = OsString::from(path);
        part.push(format!(".{}.part", std::process::id()));
        // As private as the conversation.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        Ok(Self::File(Part { file, path: part.into() }))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => out::bytes(bytes),
            Self::File(part) => part.file.write_all(bytes),
        }
    }

    fn finish(self, path: &Path) -> io::Result<()> {
        match self {
            Self::Stdout => Ok(()),
            Self::File(part) => {
                part.file.sync_all()?;
                fs::rename(&part.path, path)
            }
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // After the rename there is none.
        drop(fs::remove_file(&self.path));
    }
}

/// Makes a session of a file.
pub(crate) async fn import(client: &Client, args: ImportArgs) -> Result<Session> {
    let ImportArgs { file: path, name, model, replace } = args;
    let file = File::open(&path).map_err(|error| of_file(&path, &error))?;
    let failed = Arc::new(Mutex::new(None));
    let start = ImportStart { name, model, replace, ..ImportStart::default() };
    let imported = client.import_session_file(start, chunks(file, Arc::clone(&failed))).await;
    // What could not be read was not sent, which the daemon calls incomplete.
    match failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(of_file(&path, &error)),
        None => Ok(imported?),
    }
}

/// Returns the content of a file; it ends with an error.
fn chunks(mut file: File, failed: Arc<Mutex<Option<io::Error>>>) -> impl Iterator<Item = Vec<u8>> + Send {
    std::iter::from_fn(move || {
        let mut chunk = vec![0; CHUNK_BYTES];
        match file.read(&mut chunk) {
            Ok(0) => None,
            Ok(bytes) => {
                chunk.truncate(bytes);
                Some(chunk)
            }
            Err(error) => {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                None
            }
        }
    })
}

fn of_file(path: &Path, error: &io::Error) -> Failure {
    let text =
        if path == Path::new("-") { error.to_string() } else { format!("{}: {error}", path.display()) };
    // A reader that left stays known as one.
    io::Error::new(error.kind(), text).into()
}
