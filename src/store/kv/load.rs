//! Loading: the longest beginning of the wanted tokens that a snapshot can restore, out of what waits to be
//! written or out of files. Nothing is believed: names are compared with the wanted tokens, heads with what
//! they must be, data with its seal. A file that is wrong is left out, and the snapshot is as long as the
//! others make it.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::manifest::{Listed, Manifest};
use super::name::{Name, Naming, Piece, key_name};
use super::part::{Part, PartError, rebuilt};
use super::shelf::{Job, Shelf};
use super::{GivenUp, Loaded, NewSnapshot, SnapshotError, Wanted};
use crate::backend::{BuildKv, KvContent, KvSegment};

/// Loads what there is of the wanted tokens.
pub(super) fn load(
    shelf: &Shelf,
    wanted: &Wanted<'_>,
    builder: &dyn BuildKv,
) -> Result<Loaded, SnapshotError> {
    if let Some(waiting) = shelf.waiting(wanted.session)
        && let Some(loaded) = of_waiting(&waiting.snapshot, wanted, builder)?
    {
        return Ok(loaded);
    }
    let manifest = shelf.manifest(wanted.session)?;
    if manifest.key != key_name(wanted.key) {
        return Err(SnapshotError::Foreign);
    }
    shelf.touch(wanted.session);
    let mut reading = Reading { shelf, wanted, builder, bad: BTreeSet::new(), fault: None };
    // Each turn leaves out one file more.
    loop {
        let Some(plan) = reading.plan(&manifest) else {
            return Err(reading.fault.unwrap_or(SnapshotError::Missing));
        };
        if let Some(segments) = reading.read(&plan)? {
            return Ok(Loaded { tokens: wanted.held..plan.end, segments, fault: reading.fault });
        }
    }
}

/// What of a snapshot is to be read.
#[derive(Debug)]
struct Plan<'a> {
    end: u32,
    segments: Vec<&'a Listed>,
    states: Vec<&'a Listed>,
}

struct Reading<'a> {
    shelf: &'a Shelf,
    wanted: &'a Wanted<'a>,
    builder: &'a dyn BuildKv,
    /// Files that cannot be used.
    bad: BTreeSet<Name>,
    /// Why, of the first one.
    fault: Option<SnapshotError>,
}

impl Reading<'_> {
    fn part(&self, listed: &Listed) -> Part {
        Part::new(listed.name, listed.piece.clone(), self.wanted.layout)
    }

    /// Notes that a part cannot be used.
    fn leave_out(&mut self, listed: &Listed, error: PartError) -> Result<(), SnapshotError> {
        let fault = match error {
            // It was evicted, or never came back after a failure.
            PartError::Gone => SnapshotError::Missing,
            PartError::Damaged => {
                self.shelf.add(Job::Discard(listed.name));
                tracing::warn!(file = listed.name.file(), "a part of a snapshot is damaged, and not used");
                SnapshotError::Damaged(listed.name.file())
            }
            PartError::Io(error) => error.into(),
            PartError::Device(error) => return Err(SnapshotError::Device(error.to_string())),
        };
        self.bad.insert(listed.name);
        self.fault.get_or_insert(fault);
        Ok(())
    }

    /// Returns what can be read, as far as names tell; none if there is nothing beyond what is held.
    fn plan<'b>(&mut self, manifest: &'b Manifest) -> Option<Plan<'b>> {
        let Wanted { tokens, held, layout, .. } = *self.wanted;
        let mut naming = Naming::new(manifest.key, tokens);
        let (mut common, mut segments, mut states) = (0, Vec::new(), Vec::new());
        for listed in &manifest.parts {
            let same = naming.name(&listed.piece) == Some(listed.name);
            let Piece::Tokens(own) = &listed.piece else {
                if same && !self.bad.contains(&listed.name) {
                    states.push(listed);
                }
                continue;
            };
            if self.bad.contains(&listed.name) {
                break;
            }
            // What is held was read once, and need not be there any more.
            common = if same { own.end } else { own.start + self.alike(listed, own, manifest.key) };
            if common > own.start {
                segments.push(listed);
            }
            if !same {
                break;
            }
        }
        states.retain(|listed| listed.piece.end() <= common);
        let end =
            if layout.is_recurrent() { states.last().map_or(0, |last| last.piece.end()) } else { common };
        segments.retain(
            |listed| matches!(&listed.piece, Piece::Tokens(own) if held < own.end && own.start < end),
        );
        states.retain(|listed| held < listed.piece.end());
        (held < end).then_some(Plan { end, segments, states })
    }

    /// Returns the number of a segment's tokens that are the wanted ones, if not all are.
    fn alike(&mut self, listed: &Listed, own: &Range<u32>, key: Name) -> u32 {
        let wanted = self.wanted.tokens;
        let Some(after) = wanted.get(own.start as usize..).filter(|after| !after.is_empty()) else {
            return 0;
        };
        let stored = match self.part(listed).tokens(&*self.shelf.disk) {
            Ok(stored) => stored,
            Err(error) => {
                // Only the disk is asked here.
                drop(self.leave_out(listed, error));
                return 0;
            }
        };
        let mut naming = Naming::new(key, &wanted[..own.start as usize]);
        naming.name(&Piece::States(own.start));
        if naming.name_with(&stored, &listed.piece) != listed.name {
            drop(self.leave_out(listed, PartError::Damaged));
            return 0;
        }
        crate::count::count(stored.iter().zip(after).take_while(|(stored, wanted)| stored == wanted).count())
    }

    /// Reads what was planned; none if something of it cannot be used.
    fn read(&mut self, plan: &Plan<'_>) -> Result<Option<Vec<KvSegment>>, SnapshotError> {
        let held = self.wanted.held;
        let mut states = Vec::new();
        for listed in &plan.states {
            let Some(content) = self.read_part(listed, &(0..0))? else { return Ok(None) };
            states.push((listed.piece.end(), content));
        }
        let mut segments = Vec::new();
        for listed in &plan.segments {
            let Piece::Tokens(own) = &listed.piece else { continue };
            let tokens = own.start.max(held)..own.end.min(plan.end);
            let Some(content) = self.read_part(listed, &tokens)? else { return Ok(None) };
            let inside = |(length, _): &&(u32, KvContent)| tokens.start < *length && *length <= tokens.end;
            let states = states.iter().filter(inside).cloned().collect();
            segments.push(KvSegment { tokens, content, states });
        }
        Ok(Some(segments))
    }

    fn read_part(
        &mut self,
        listed: &Listed,
        tokens: &Range<u32>,
    ) -> Result<Option<KvContent>, SnapshotError> {
        if self.wanted.stop.load(Ordering::Relaxed) {
            return Err(SnapshotError::GivenUp(GivenUp::Held));
        }
        match self.part(listed).read(&*self.shelf.disk, self.builder, tokens) {
            Ok(content) => Ok(Some(content)),
            Err(error) => self.leave_out(listed, error).map(|()| None),
        }
    }
}

/// Returns what a snapshot has of the wanted tokens before it is written; none if it has none.
fn of_waiting(
    snapshot: &NewSnapshot,
    wanted: &Wanted<'_>,
    builder: &dyn BuildKv,
) -> Result<Option<Loaded>, SnapshotError> {
    let NewSnapshot { key, tokens, segments, .. } = snapshot;
    if key != wanted.key {
        return Ok(None);
    }
    let same = tokens.iter().zip(wanted.tokens).take_while(|(own, wanted)| own == wanted).count();
    let common = crate::count::count(same);
    let lengths = segments.iter().flat_map(|segment| &segment.states).map(|(length, _)| *length);
    let end = if wanted.layout.is_recurrent() {
        lengths.filter(|length| *length <= common).max().unwrap_or(0)
    } else {
        common
    };
    if end <= wanted.held {
        return Ok(None);
    }
    let mut taken = Vec::new();
    for segment in segments {
        let own = &segment.tokens;
        let tokens = own.start.max(wanted.held)..own.end.min(end);
        if tokens.is_empty() {
            continue;
        }
        let content = if *own == tokens {
            segment.content.clone()
        } else {
            let cut = rebuilt(&*segment.content, wanted.layout, own, &tokens, builder);
            cut.map_err(|error| SnapshotError::Device(error.to_string()))?
        };
        let inside = |(length, _): &&(u32, KvContent)| tokens.start < *length && *length <= tokens.end;
        let states = segment.states.iter().filter(inside).cloned().collect();
        taken.push(KvSegment { tokens, content, states });
    }
    Ok(Some(Loaded { tokens: wanted.held..end, segments: taken, fault: None }))
}
