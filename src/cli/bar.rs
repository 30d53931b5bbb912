//! A progress bar on a terminal, as every command shows one.

use indicatif::{ProgressBar, ProgressStyle};

/// Returns a bar of a template.
pub(crate) fn styled(template: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    // Without the style the bar is indicatif's own.
    ProgressStyle::with_template(template).map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}
