//! Finds markers in a stream of characters, wherever the stream is cut.
//!
//! Text that may be the beginning of a marker is held back, at most a marker's length. A marker begins as
//! early as possible; none of a set may be the beginning of another one of it.

/// The state of one stream.
#[derive(Clone, Debug, Default)]
pub(super) struct Scan {
    /// The end of the text that is the beginning of a marker.
    held: String,
}

impl Scan {
    /// Takes a character. Appends to `out` what cannot belong to a marker any more, and returns the index of
    /// the marker that ends here.
    pub(super) fn step(&mut self, c: char, markers: &[&str], out: &mut String) -> Option<usize> {
        if self.held.is_empty() && !markers.iter().any(|marker| marker.starts_with(c)) {
            out.push(c);
            return None;
        }
        self.held.push(c);
        while !self.held.is_empty() {
            if let Some(index) = markers.iter().position(|marker| marker.starts_with(&self.held)) {
                if markers[index].len() > self.held.len() {
                    return None;
                }
                self.held.clear();
                return Some(index);
            }
            out.push(self.held.remove(0));
        }
        None
    }

    /// Takes a character where only a marker may stand, behind white space: returns the marker that ends
    /// here, if one does already, or how many bytes up to here are not one.
    pub(super) fn anchored(&mut self, c: char, markers: &[&str]) -> Result<Option<usize>, usize> {
        if c.is_whitespace() && self.held.is_empty() {
            return Ok(None);
        }
        let mut other = String::new();
        let found = self.step(c, markers, &mut other);
        if other.is_empty() {
            return Ok(found);
        }
        Err(other.len() + found.map_or(0, |index| markers[index].len()) + self.take().len())
    }

    /// Returns the text held back.
    pub(super) fn held(&self) -> &str {
        &self.held
    }

    /// Ends the stream and returns the text held back.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scanned(text: &str, markers: &[&str]) -> (String, Vec<usize>) {
        let mut scan = Scan::default();
        let mut out = String::new();
        let found = text.chars().filter_map(|c| scan.step(c, markers, &mut out)).collect();
        out += &scan.take();
        (out, found)
    }

    #[test]
    fn where_only_a_marker_may_stand_the_rest_is_counted() {
        let mut scan = Scan::default();
        assert_eq!(scan.anchored('\n', &["<a>", "<bc>"]), Ok(None));
        assert_eq!(scan.anchored('<', &["<a>", "<bc>"]), Ok(None));
        assert_eq!(scan.anchored('b', &["<a>", "<bc>"]), Ok(None));
        assert_eq!(scan.anchored('é', &["<a>", "<bc>"]), Err(4));
        assert_eq!(scan.held(), "");
        assert_eq!("<a>".chars().map(|c| scan.anchored(c, &["<a>"])).last(), Some(Ok(Some(0))));
    }

    #[test]
    fn markers_are_found_where_they_begin_first() {
        let markers = ["<a>", "aab", "é|"];
        assert_eq!(scanned("x<a>y", &markers), ("xy".into(), vec![0]));
        assert_eq!(scanned("<<a>aaab", &markers), ("<a".into(), vec![0, 1]));
        assert_eq!(scanned("é|éé|<a", &markers), ("é<a".into(), vec![2, 2]));
        assert_eq!(scanned("", &markers), (String::new(), Vec::new()));
    }
}
