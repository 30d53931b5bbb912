//! Pages of lists: as many entries as fit in an answer. A page goes on after the name that its token is.

use prost::Message;

use crate::error::Error;

/// Bytes before a message or a text in an answer: its tag and its length.
pub(super) const FIELD_BYTES: usize = 6;

/// Returns the first entries that fit in an answer of `bytes_max`, with the token of the next page: the last
/// entry's name, or `next` after all of them.
pub(super) fn fitting<Entry: Message>(
    entries: impl Iterator<Item = Entry>,
    name: impl Fn(&Entry) -> &str,
    next: Option<String>,
    bytes_max: usize,
) -> Result<(Vec<Entry>, Option<String>), Error> {
    let mut page: Vec<Entry> = Vec::new();
    let mut bytes = 0;
    for entry in entries {
        let own = entry.encoded_len() + FIELD_BYTES;
        if bytes + own + name(&entry).len() + FIELD_BYTES > bytes_max {
            let Some(last) = page.last() else {
                return Err(Error::AnswerTooLarge { limit_bytes: bytes_max as u64 });
            };
            let token = name(last).to_owned();
            return Ok((page, Some(token)));
        }
        bytes += own;
        page.push(entry);
    }
    Ok((page, next))
}
