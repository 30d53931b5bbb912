//! Opens the weight files of a load on a thread of its own, ahead of the engine: a file system that does not
//! answer keeps this load waiting, and others only if they have no room beside it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread;

use crate::error::Error;
use crate::hub::{ContentHash, HubError, ModelAssets, OpenWeights, WeightFile};
use crate::mlx::ffi::TensorFile;

/// Files that are open before they are asked for.
const AHEAD: usize = 4;

/// The weight files of a load, as they are opened.
#[derive(Debug)]
pub(super) struct Opening {
    assets: Arc<ModelAssets>,
    files: Receiver<Result<(TensorFile, ContentHash), HubError>>,
    /// For each file that is yet to come, the last one first, whether the index does not name it.
    left: Vec<bool>,
    /// The hashes of those that were taken.
    hashes: Vec<ContentHash>,
}

impl Opening {
    /// Begins to open the files of a model.
    pub(super) fn new(assets: &Arc<ModelAssets>) -> Result<Self, Error> {
        let (sender, files) = sync_channel(AHEAD);
        let mut left: Vec<bool> = assets.files.weights.all().map(|(_, is_spare)| is_spare).collect();
        left.reverse();
        let opened = Arc::clone(assets);
        let body = move || {
            for (file, _) in opened.files.weights.all() {
                let found = open_hashed(file);
                // Nobody receives once the load was given up.
                if sender.send(found).is_err() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("weights".into()).spawn(body);
        thread.map_err(|error| Error::Internal(format!("the thread that opens weight files: {error}")))?;
        Ok(Self { assets: Arc::clone(assets), files, left, hashes: Vec::new() })
    }

    /// Returns whether all files were taken.
    pub(super) fn is_done(&self) -> bool {
        self.left.is_empty()
    }

    /// Returns the hash of config and files, once all were taken.
    pub(super) fn content(&self) -> ContentHash {
        ContentHash::new(&self.assets.files, &self.hashes)
    }

    /// Takes the next file, and whether the index does not name it; None if it is not open yet.
    pub(super) fn take(&mut self) -> Result<Option<(TensorFile, bool)>, Error> {
        match self.files.try_recv() {
            Ok(Ok((file, hash))) => {
                self.hashes.push(hash);
                Ok(self.left.pop().map(|is_spare| (file, is_spare)))
            }
            Ok(Err(error)) => {
                let model = &self.assets.files.name;
                tracing::warn!(%model, %error, "a weight file cannot be opened");
                Err(error.into_error(model))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => {
                Err(Error::Internal("the thread that opens weight files ended".into()))
            }
        }
    }
}

/// Opens a file.
pub(super) fn open(file: &WeightFile) -> Result<TensorFile, HubError> {
    Ok(tensor_file(file, file.open()?))
}

/// Opens a file and hashes it.
fn open_hashed(file: &WeightFile) -> Result<(TensorFile, ContentHash), HubError> {
    let opened = file.open()?;
    let hash = file.content(&opened)?;
    Ok((tensor_file(file, opened), hash))
}

fn tensor_file(of: &WeightFile, opened: OpenWeights) -> TensorFile {
    let OpenWeights { file, head, bytes } = opened;
    TensorFile { file, head, bytes, name: of.name() }
}
