//! The engine thread: takes commands, takes turns, and tells when it ends. Whatever way it ends, by
//! return or by panic, the handle hears of it.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::core::{Engine, EngineSettings};
use super::handle::EngineHandle;
use super::work::Command;
use crate::backend::Backend;
use crate::backend::DeviceInfo;
use crate::clock::Clock;
use crate::error::Error;

/// Commands that may wait for the engine beyond the queue of requests: loads, stats and the like.
const COMMANDS_EXTRA: usize = 64;

/// Between two looks at what everybody waits for: readers, memory, the end of a drain.
const WAIT: Duration = Duration::from_millis(2);

/// How long nothing runs until memory that is kept for reuse is given back.
const REST: Duration = Duration::from_secs(1);

/// Tells that the thread is gone, also when it unwinds.
struct Alive(watch::Sender<bool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

/// Starts the engine thread. `make` runs on it and takes the device into use. Returns once the device is
/// ready. The thread ends when every handle is gone.
pub fn start<B, F>(
    settings: EngineSettings,
    clock: Arc<dyn Clock>,
    make: F,
) -> Result<(EngineHandle, JoinHandle<()>), Error>
where
    B: Backend,
    F: FnOnce(&EngineSettings) -> Result<(B, DeviceInfo), Error> + Send + 'static,
{
    let (commands, receiver) = mpsc::channel(settings.queue_length_max as usize + COMMANDS_EXTRA);
    let (alive, watch) = watch::channel(true);
    let (ready, device) = std::sync::mpsc::sync_channel(1);
    let body = move || {
        let _alive = Alive(alive);
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let timer = timer.map_err(|error| Error::Internal(format!("the engine's timer: {error}")));
        match timer.and_then(|timer| Ok((timer, make(&settings)?))) {
            Ok((timer, (backend, info))) => {
                let engine = Engine::new(backend, clock, settings, info.budget_bytes);
                if ready.send(Ok(info)).is_ok() {
                    run(engine, receiver, &timer);
                }
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(body);
    let thread = thread.map_err(|error| Error::Internal(format!("the engine thread: {error}")))?;
    let info = device.recv().map_err(|_| Error::EngineDead)??;
    Ok((EngineHandle::new(commands, watch, info), thread))
}

fn run<B: Backend>(mut engine: Engine<B>, mut commands: mpsc::Receiver<Command>, timer: &Runtime) {
    // When to rest; None is once it has rested.
    let mut rest_at = None;
    loop {
        let mut worked = !engine.is_idle();
        if engine.is_idle() {
            let command = match rest_at {
                None => Ok(commands.blocking_recv()),
                Some(at) => {
                    let left = at - engine.clock.now();
                    timer.block_on(async { timeout(left, commands.recv()).await })
                }
            };
            match command {
                Ok(Some(command)) => {
                    worked |= command.is_work();
                    engine.command(command);
                }
                Ok(None) => return,
                Err(_) => {
                    engine.rest();
                    rest_at = None;
                    continue;
                }
            }
        }
        while let Ok(command) = commands.try_recv() {
            worked |= command.is_work();
            engine.command(command);
        }
        let ran = engine.turn();
        if worked {
            rest_at = Some(engine.clock.now().after(REST));
        }
        if !ran && !engine.is_idle() {
            std::thread::sleep(WAIT);
        }
    }
}
