//! The engine thread: takes commands, ticks, and tells when it ends. However it ends, by return or by panic,
//! the handle hears of it.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::api::{Command, EngineHandle, EngineSettings, Pulse, command_capacity};
use super::core::Engine;
use crate::backend::Backend;
use crate::backend::DeviceInfo;
use crate::clock::Clock;
use crate::error::Error;
use crate::residency::ResidencySettings;

/// Pause between two ticks that only wait: for readers, memory, or the end of a drain.
const WAIT: Duration = Duration::from_millis(2);

/// Most commands that are carried out between two ticks, whoever sends how many: a step waits for no more.
const COMMANDS_PER_TICK_MAX: usize = 64;

/// Time after which no further one is begun: some are dear, and a step waits for few of those.
const COMMANDS_TIME: Duration = Duration::from_millis(2);

/// Time without work after which memory that is cached for reuse is freed.
const REST: Duration = Duration::from_secs(1);

/// Shortest wait for a model to expire.
const EXPIRY_WAIT_MIN: Duration = Duration::from_millis(20);

/// Tells that the thread has ended, also when it unwinds.
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
    residency: ResidencySettings,
    clock: Arc<dyn Clock>,
    make: F,
) -> Result<(EngineHandle, JoinHandle<()>), Error>
where
    B: Backend,
    F: FnOnce() -> Result<(B, DeviceInfo), Error> + Send + 'static,
{
    let (commands, receiver) = mpsc::channel(command_capacity(settings.queue_length_max));
    let (alive, watch) = watch::channel(true);
    let (ready, device) = std::sync::mpsc::sync_channel(1);
    let pulse = Pulse::default();
    let handed = pulse.clone();
    let body = move || {
        let _alive = Alive(alive);
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let timer = timer.map_err(|error| Error::Internal(format!("the engine's timer: {error}")));
        match timer.and_then(|timer| Ok((timer, make()?))) {
            Ok((timer, (backend, info))) => {
                let mut engine = Engine::new(backend, clock, settings, 0);
                engine.configure(residency);
                if ready.send(Ok((info, engine.table()))).is_ok() {
                    run(engine, receiver, &timer, &pulse);
                }
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(body);
    let thread = thread.map_err(|error| Error::Internal(format!("the engine thread: {error}")))?;
    let (info, models) = device.recv().map_err(|_| Error::EngineDead)??;
    Ok((EngineHandle::new(commands, watch, info, settings, models).with_pulse(handed), thread))
}

fn run<B: Backend>(
    mut engine: Engine<B>,
    mut commands: mpsc::Receiver<Command>,
    timer: &Runtime,
    pulse: &Pulse,
) {
    // When to rest; None once it has rested.
    let mut rest_at = None;
    loop {
        let mut worked = !engine.is_idle();
        if engine.is_idle() {
            pulse.wait();
            let command = match rest_at.into_iter().chain(engine.next_expiry()).min() {
                None => Ok(commands.blocking_recv()),
                Some(at) => {
                    // A model may have expired and be in use by a call that is not here yet.
                    let left = (at - engine.clock.now()).max(EXPIRY_WAIT_MIN);
                    timer.block_on(async { timeout(left, commands.recv()).await })
                }
            };
            pulse.begin();
            match command {
                Ok(Some(command)) => {
                    worked |= command.is_work();
                    engine.command(command);
                }
                Ok(None) => return,
                Err(_) => {
                    let now = engine.clock.now();
                    let rests = rest_at.is_some_and(|at| at <= now);
                    if engine.expire() || rests {
                        engine.rest();
                        rest_at = None;
                    }
                    continue;
                }
            }
        }
        pulse.begin();
        worked |= take_commands(&mut engine, &mut commands);
        let ran = engine.tick();
        if worked {
            rest_at = Some(engine.clock.now().after(REST));
        }
        if !ran && !engine.is_idle() {
            std::thread::sleep(WAIT);
        }
    }
}

/// Carries out the commands that wait, but a bounded number of them and for a bounded time. Returns whether
/// one was work.
fn take_commands<B: Backend>(engine: &mut Engine<B>, commands: &mut mpsc::Receiver<Command>) -> bool {
    let mut worked = false;
    let until = engine.clock.now().after(COMMANDS_TIME);
    for _ in 0..COMMANDS_PER_TICK_MAX {
        let Ok(command) = commands.try_recv() else { break };
        worked |= command.is_work();
        engine.command(command);
        if engine.clock.now() >= until {
            break;
        }
    }
    worked
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::super::tests::{HandClock, settings};
    use super::*;
    use crate::backend::fake::{Fake, spec};

    fn reached(condition: impl Fn() -> bool) {
        while !condition() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_thread_that_hangs_stays_in_its_turn_and_an_idle_one_is_in_none() {
        let clock = Arc::new(HandClock::default());
        let info = DeviceInfo {
            device: "fake".into(),
            mlx_version: "0".into(),
            memory_bytes: None,
            architectures: vec![],
        };
        let made = (Fake::default(), info);
        let clock_of_engine = Arc::clone(&clock) as Arc<dyn Clock>;
        let (engine, thread) =
            start(settings(), ResidencySettings::default(), clock_of_engine, move || Ok(made)).unwrap();
        reached(|| engine.turn().is_none());
        // A drain asks for the time, which it does not get.
        let held = clock.0.lock().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(engine.drain(Duration::from_secs(1))).unwrap();
            });
            reached(|| engine.turn().is_some());
            let turn = engine.turn();
            std::thread::yield_now();
            assert_eq!(engine.turn(), turn);
            drop(held);
        });
        reached(|| engine.turn().is_none());
        drop(engine);
        thread.join().unwrap();
    }

    /// Asks more often whether a model fits than a tick answers, where the answer takes this long; returns
    /// how many answers two ticks give.
    fn answers_of_two_ticks(each: Duration) -> [usize; 2] {
        let clock = Arc::new(HandClock::default());
        let (mut fake, of_plan) = (Fake::default(), Arc::clone(&clock));
        fake.pass_plan = Some(Box::new(move || *of_plan.0.lock().unwrap() += each));
        let mut engine = Engine::new(fake, clock, settings(), 10_000);
        let (sender, mut commands) = mpsc::channel(4 * COMMANDS_PER_TICK_MAX);
        let mut answers: Vec<_> = (0..2 * COMMANDS_PER_TICK_MAX)
            .map(|_| {
                let (reply, answer) = oneshot::channel();
                sender.try_send(Command::Fits(spec("new"), reply)).unwrap();
                answer
            })
            .collect();
        [(), ()].map(|()| {
            assert!(!take_commands(&mut engine, &mut commands), "a question frees and uses nothing");
            answers.iter_mut().filter_map(|answer| answer.try_recv().ok()).count()
        })
    }

    #[test]
    fn a_tick_waits_for_a_bounded_number_of_commands() {
        assert_eq!(answers_of_two_ticks(Duration::ZERO), [COMMANDS_PER_TICK_MAX; 2]);
    }

    #[test]
    fn a_tick_waits_for_commands_no_longer_than_the_dearest_of_them_takes() {
        assert_eq!(answers_of_two_ticks(COMMANDS_TIME / 4), [4; 2]);
        assert_eq!(answers_of_two_ticks(COMMANDS_TIME * 100), [1; 2]);
    }
}
