//! The progress of a download: on a terminal a bar by file and one for all, elsewhere a line by file.

use std::collections::{BTreeMap, BTreeSet};

use indicatif::{MultiProgress, ProgressBar};
use mlxd::hub::{FileProgress, FileState, Progress};

use super::bar::styled;
use super::{format, out};

const FILE: &str = "{msg:28!} {wide_bar} {binary_bytes:>10} of {binary_total_bytes:<10}";
const ALL: &str =
    "{msg:28!} {wide_bar} {binary_bytes:>10} of {binary_total_bytes:<10} {binary_bytes_per_sec}, {eta}";

/// Smaller files have no bar of their own.
const BAR_BYTES: u64 = 1 << 20;

/// Shows a download to a person.
pub(crate) struct TransferBars {
    /// None where nobody watches a terminal.
    bars: Option<Bars>,
    /// Files whose end was told.
    told: BTreeSet<String>,
}

struct Bars {
    group: MultiProgress,
    all: ProgressBar,
    files: BTreeMap<String, ProgressBar>,
}

impl TransferBars {
    /// Begins to show the download of `name`.
    pub(crate) fn new(name: &str) -> Self {
        if !out::notes_are_watched() {
            out::note(&format!("downloading {name}\n"));
            return Self { bars: None, told: BTreeSet::new() };
        }
        let group = MultiProgress::new();
        let all = group.add(styled(ALL));
        all.set_message(name.to_owned());
        Self { bars: Some(Bars { group, all, files: BTreeMap::new() }), told: BTreeSet::new() }
    }

    /// Shows how far it has come.
    pub(crate) fn show(&mut self, progress: &Progress) {
        match &mut self.bars {
            Some(bars) => bars.show(progress),
            None => self.tell(progress),
        }
    }

    /// Ends with a line.
    pub(crate) fn finish(self, line: &str) {
        if let Some(Bars { all, files, group: _ }) = self.bars {
            // A bar that goes later would be drawn once more, below the line.
            files.values().chain([&all]).for_each(ProgressBar::finish_and_clear);
        }
        out::note(line);
    }

    fn tell(&mut self, progress: &Progress) {
        for file in progress.files() {
            if file.state() == FileState::Done && self.told.insert(file.name.clone()) {
                out::note(&format!("{}: {}\n", file.name, format::bytes(file.total_bytes)));
            }
        }
    }
}

impl Bars {
    fn show(&mut self, progress: &Progress) {
        let (done, total) = progress.bytes();
        self.all.set_length(total);
        self.all.set_position(done);
        for file in progress.files().iter().filter(|file| file.total_bytes >= BAR_BYTES) {
            self.show_file(file);
        }
    }

    fn show_file(&mut self, file: &FileProgress) {
        let group = &self.group;
        let bar = self.files.entry(file.name.clone()).or_insert_with(|| {
            let bar = group.add(styled(FILE));
            bar.set_length(file.total_bytes);
            bar
        });
        bar.set_message(match file.state() {
            FileState::Verifying => format!("verifying {}", file.name),
            FileState::Waiting | FileState::Downloading | FileState::Done => file.name.clone(),
        });
        bar.set_position(file.done_bytes());
    }
}
