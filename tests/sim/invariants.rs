//! What holds after every tick.

use std::collections::BTreeSet;

use tokio::sync::oneshot;

use super::world::World;
use crate::engine::Command;
use crate::engine::load::Load;
use crate::engine::model::Resident;
use crate::engine::task::Sequence;
use crate::sched::Owner;

/// Most choices of a request.
pub(super) const CHOICES_MAX: u32 = 4;

impl World {
    pub(super) fn check(&mut self) {
        self.check_ledger();
        self.check_leases();
        self.check_slots();
        self.check_shares();
        self.check_queues();
        self.check_blocked();
        self.check_sessions();
        self.check_rows();
    }

    /// What decodes does so within a bounded number of ticks: every second one has a row more than those of
    /// every step, every seventh of those is of its class, and around a row are three circles with turns.
    fn check_rows(&mut self) {
        let before = std::mem::take(&mut self.waiting_rows);
        for resident in self.engine.models.values() {
            for (&id, sequence) in &resident.running {
                if sequence.is_paused() || sequence.pending() > 1 || sequence.waits_for_mask(true) {
                    continue;
                }
                let (key, computed) = ((resident.id, id), sequence.computed);
                let waited = before.get(&key).filter(|(last, _)| *last == computed).map_or(0, |(_, n)| n + 1);
                assert!(waited <= 2 * 7 * 3 * self.running_max, "a row waits for {waited} ticks");
                self.waiting_rows.insert(key, (computed, waited));
            }
        }
    }

    /// The engine counts what the backend holds, which exceeds the budget only while a smaller budget is not
    /// reached yet, or for a request that had begun before.
    fn check_ledger(&mut self) {
        for resident in self.engine.models.values() {
            let held = self.engine.backend.bytes(resident.id);
            assert_eq!(resident.bytes(), held, "the ledger counts what is held of {}", resident.spec.model());
        }
        // Asserts that the parts add up.
        let (reply, _) = oneshot::channel();
        self.engine.command(Command::Stats(reply));
        let used = self.engine.used_bytes();
        let mut waiting = self.engine.models.values().flat_map(|resident| resident.queue.values());
        if used <= self.engine.budget_bytes && !waiting.any(Sequence::has_begun) {
            self.shrunk = false;
        }
        assert!(self.shrunk || used <= self.engine.budget_bytes, "{used} of {}", self.engine.budget_bytes);
        // What warms a load up is not counted.
        let weights: u64 = self.engine.models.values().map(|resident| resident.shape.weight_bytes).sum();
        let peak = weights + self.engine.backend.kv_bytes_peak;
        let budget = self.budget_before.max(self.engine.budget_bytes);
        assert!(!self.settled || peak <= budget, "{peak} of {budget}");
    }

    /// What waits or runs holds its model.
    fn check_leases(&mut self) {
        for Resident { running, queue, tenancy, .. } in self.engine.models.values_mut() {
            let mut sequences = running.values_mut().chain(queue.values_mut());
            assert!(sequences.all(|sequence| tenancy.granted(&sequence.lease)), "a sequence has its lease");
        }
    }

    fn check_slots(&self) {
        for resident in self.engine.models.values() {
            let slots: BTreeSet<_> = resident.running.values().map(|sequence| sequence.slot).collect();
            assert!(!slots.contains(&None), "what runs has a slot");
            assert_eq!(slots.len(), resident.running.len(), "no two sequences share a slot");
            let in_use: u32 = resident.slots.classes().iter().map(|class| class.slots_in_use).sum();
            // Those of sequences that a drain ended go with the process.
            let is_over = self.engine.draining && slots.is_empty();
            assert!(is_over || in_use as usize == slots.len(), "no slot is lost");
            assert!(resident.running.len() <= self.running_max as usize, "no more run than the limit allows");
        }
    }

    fn check_shares(&self) {
        for resident in self.engine.models.values() {
            let owners = || resident.running.values().map(|sequence| &sequence.origin.owner);
            for owner in owners() {
                let of_principal = |other: &&Owner| other.principal == owner.principal;
                let of_connection =
                    |other: &&Owner| of_principal(other) && other.connection == owner.connection;
                let counts = [
                    owners().filter(of_principal).count(),
                    owners().filter(of_connection).count(),
                    owners().filter(|other| *other == owner).count(),
                ];
                let running = resident.shares.rank(owner).map(|(running, ..)| running as usize);
                assert_eq!(running, counts, "{owner:?} has what runs");
            }
            let nobody = resident.running.is_empty() && resident.queue.is_empty();
            assert_eq!(resident.shares.is_empty(), nobody, "shares are of those who are there");
        }
    }

    /// Preempted sequences wait beside those that the limit counts, and a request of more choices than the
    /// limit of its client takes as many places as that.
    fn check_queues(&self) {
        let queued: u32 = self.engine.models.values().map(Resident::queued).sum();
        let models = u32::try_from(self.engine.models.len()).unwrap();
        assert!(queued <= self.queue_max + self.running_max * models + CHOICES_MAX, "{queued} wait");
    }

    /// Those who pass a blocked request leave room for it: once the others have ended, and the reads of
    /// snapshots, it starts. If models in use have to leave for it, it waits as long as calls that came
    /// before it, or that have not reached the engine, hold one that would make room. One that is owed its
    /// memory waits until nothing else runs.
    fn check_blocked(&mut self) {
        let could_start = self.engine.blocked.as_ref().is_some_and(|blocked| {
            let models = || self.engine.models.values();
            let older =
                models().any(|resident| resident.running.range(..blocked.passed_from).next().is_some());
            let passed: u64 =
                models().map(|resident| resident.claims(blocked.passed_from).passed_bytes).sum();
            let loading: u64 = self.engine.loads.iter().map(Load::reserved_bytes).sum();
            let taken = loading + self.snapshots.hanging_bytes();
            let available = self.engine.room(&blocked.model).kv_bytes_now.saturating_sub(taken);
            let running = self.engine.models.get(&blocked.model).map_or(0, Resident::running);
            !older
                && !self.shrunk
                && running < self.running_max
                && passed + blocked.wanted.needed_bytes <= available
        });
        let is_owed = self.engine.blocked.as_ref().is_some_and(|blocked| blocked.wanted.is_owed);
        let is_idle = could_start || if is_owed { self.engine.is_quiet() } else { self.is_crowded_out() };
        let free_bytes = self.engine.budget_bytes.saturating_sub(self.engine.used_bytes());
        let (ticks, free_bytes_before) = self.idly_blocked;
        // What is reclaimable elsewhere is freed in one tick and used in the next; others may start between.
        let was_freed = ticks > 0 && free_bytes > free_bytes_before;
        self.idly_blocked = if is_idle { (ticks + u32::from(!was_freed), free_bytes) } else { (0, 0) };
        assert!(self.idly_blocked.0 <= 3, "{:?} waits for nobody", self.engine.blocked);
    }

    /// Returns whether the blocked request has no room but that of models which only later calls keep in use.
    fn is_crowded_out(&self) -> bool {
        let Some(blocked) = self.engine.blocked.as_ref() else { return false };
        let Some(waits) = self.engine.models.get(&blocked.model) else { return true };
        let room = self.engine.room(&blocked.model);
        let needed_bytes = blocked.wanted.needed_bytes;
        let Some(came) = waits.queue.peek(&blocked.ticket).map(|sequence| sequence.origin.arrived) else {
            return false;
        };
        let leaves_in_time = |other: &&Resident| {
            let sequences = || other.running.values().chain(other.queue.values());
            let is_waited_for = sequences().any(|sequence| sequence.origin.arrived <= came);
            !other.is_pinned(&self.engine.residency) && (is_waited_for || other.running.is_empty())
        };
        let others = || self.engine.models.values().filter(|other| *other.spec.model() != blocked.model);
        let stay = others().filter(|other| !leaves_in_time(other)).map(|other| other.shape.weight_bytes);
        let own = waits.shape.weight_bytes;
        needed_bytes > room.kv_bytes_now && own + stay.sum::<u64>() + needed_bytes > self.engine.budget_bytes
    }

    pub(super) fn check_rest(&mut self) {
        self.check();
        for resident in self.engine.models.values() {
            assert!(resident.is_idle(), "nothing is left to do");
            assert_eq!(resident.promised_bytes(), 0, "nothing is promised");
            assert!(
                resident.slots.classes().iter().all(|class| class.slots_in_use == 0),
                "no slot is in use"
            );
        }
        assert!(self.engine.is_idle());
        for (key, known) in self.kept.clone() {
            let key = &key;
            self.warm(key);
            let view = self.book.read(key, |session| Ok(session.view()));
            if let Ok(view) = view {
                assert_eq!(*view.tokens, *known.tokens, "{key} holds the turns that ended well");
                assert!(!view.busy, "{key} has no turn");
            }
        }
    }
}
