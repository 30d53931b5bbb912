//! Makes the `:authority` of requests on the unix socket one that HTTP/2 libraries accept. gRPC's C core
//! (Python, Ruby, C++, PHP) sends the socket's path there, which the server's library refuses before anybody
//! sees the request; and on a socket the name means nothing.
//!
//! Each character that is not a host's becomes a dot, in place, as the bytes pass. No length changes, so
//! frames and the compression of headers (HPACK, RFC 7541), which counts lengths, stay as they are. In a
//! Huffman code, which other libraries send, the characters of paths are as long as a dot; a byte waits for
//! the next one, into which its last code may reach. Bytes that are not understood pass as they are; the
//! server's library judges them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// Bytes before the first frame: `PRI * HTTP/2.0`, and so on.
const PREFACE_BYTES: usize = 24;

const FRAME_HEAD_BYTES: usize = 9;

/// Kinds and flags of frames, RFC 9113 §6.2.
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;

/// Bytes of the priority in a HEADERS frame.
const PRIORITY_BYTES: usize = 5;

/// The name, and its index in the static table (RFC 7541 appendix A). The C core writes the name.
const AUTHORITY: &[u8] = b":authority";
const AUTHORITY_INDEX: usize = 1;

/// Codes of six bits (RFC 7541 appendix B) of what is in paths and not in hosts: space, `%`, `/`, `=`, `_`.
const CODES_OF_PATHS: [u8; 5] = [0x14, 0x15, 0x18, 0x20, 0x22];
/// And that of a dot.
const CODE_OF_DOT: u16 = 0x17;

/// Bits after which an integer is too large to be a length.
const INTEGER_BITS_MAX: u32 = 28;

/// A stream whose requests have an acceptable authority.
pub(super) struct PlainAuthority<S> {
    stream: S,
    frames: Frames,
    /// A byte that waits for the next one.
    held: Option<u8>,
}

impl<S> PlainAuthority<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, frames: Frames::new(), held: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PlainAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        loop {
            let held = self.held.take();
            if let Some(byte) = held {
                buffer.put_slice(&[byte]);
            }
            // A buffer for one byte has no room for the next.
            let mut is_last = buffer.remaining() == 0;
            let begun = buffer.filled().len();
            if !is_last {
                let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
                if polled.is_pending() {
                    buffer.set_filled(before);
                    self.held = held;
                }
                ready!(polled)?;
                is_last = buffer.filled().len() == begun;
            }
            let bytes = &mut buffer.filled_mut()[before..];
            let passed = if is_last { self.frames.pass_all(bytes) } else { self.frames.pass(bytes) };
            self.held = bytes.get(passed).copied();
            let nothing = bytes.is_empty();
            buffer.set_filled(before + passed);
            if passed > 0 || nothing {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// Where a stream of frames stands.
struct Frames {
    part: FramePart,
    fields: Fields,
}

/// Part of a frame; each with the number of bytes that are left.
enum FramePart {
    /// The preface, a payload of another kind, or padding.
    Skipped(usize),
    /// A frame's head, as far as it came.
    Head([u8; FRAME_HEAD_BYTES], usize),
    /// The byte that says how much padding ends the frame, and the payload after it.
    PadLength { payload: usize, priority: usize },
    /// The priority, before the fields.
    Priority { left: usize, fields: usize, padding: usize },
    /// Compressed fields.
    Fields { left: usize, padding: usize },
}

impl Frames {
    fn new() -> Self {
        Self { part: FramePart::Skipped(PREFACE_BYTES), fields: Fields::default() }
    }

    /// Follows the next bytes, the last ones included.
    fn pass_all(&mut self, bytes: &mut [u8]) -> usize {
        let mut passed = self.pass(bytes);
        while passed < bytes.len() {
            self.fields.is_authority = false;
            passed += self.pass(&mut bytes[passed..]);
        }
        passed
    }

    /// Follows the next bytes, and changes those of an authority. Returns their number; the last one may have
    /// to wait for the next.
    fn pass(&mut self, mut bytes: &mut [u8]) -> usize {
        let length = bytes.len();
        while let [first, ..] = bytes {
            let taken = match &mut self.part {
                FramePart::Skipped(left) | FramePart::Priority { left, .. } => {
                    let taken = bytes.len().min(*left);
                    *left -= taken;
                    taken
                }
                FramePart::Head(head, filled) => {
                    head[*filled] = *first;
                    *filled += 1;
                    1
                }
                FramePart::PadLength { payload, priority } => {
                    let left = (*priority).min(*payload);
                    let padding = usize::from(*first).min(*payload - left);
                    self.part = FramePart::Priority { left, fields: *payload - left - padding, padding };
                    1
                }
                FramePart::Fields { left, .. } => {
                    if self.fields.waits(*left) && bytes.len() == 1 {
                        break;
                    }
                    let here = bytes.len().min(*left);
                    self.fields.pass(&mut bytes[..here]);
                    *left -= 1;
                    1
                }
            };
            bytes = &mut bytes[taken..];
            self.advance();
        }
        length - bytes.len()
    }

    /// Goes on to the next part that has bytes.
    fn advance(&mut self) {
        loop {
            self.part = match self.part {
                FramePart::Skipped(0) => FramePart::Head([0; FRAME_HEAD_BYTES], 0),
                FramePart::Head(head, FRAME_HEAD_BYTES) => self.begin(head),
                FramePart::Priority { left: 0, fields, padding } => {
                    FramePart::Fields { left: fields, padding }
                }
                FramePart::Fields { left: 0, padding } => FramePart::Skipped(padding),
                _ => return,
            };
        }
    }

    /// Returns the first part of the payload of a frame.
    fn begin(&mut self, head: [u8; FRAME_HEAD_BYTES]) -> FramePart {
        let [high, middle, low, kind, flags, ..] = head;
        let payload = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        match kind {
            HEADERS => {
                self.fields = Fields::default();
                let priority = if flags & PRIORITY == 0 { 0 } else { PRIORITY_BYTES };
                if flags & PADDED != 0 && payload > 0 {
                    return FramePart::PadLength { payload: payload - 1, priority };
                }
                let priority = priority.min(payload);
                FramePart::Priority { left: priority, fields: payload - priority, padding: 0 }
            }
            CONTINUATION => FramePart::Fields { left: payload, padding: 0 },
            _ => FramePart::Skipped(payload),
        }
    }
}

/// Where a block of compressed fields stands.
#[derive(Default)]
struct Fields {
    part: FieldPart,
    /// The integer that is being read, and its bits so far.
    number: usize,
    bits: u32,
    is_authority: bool,
    /// Where the next Huffman code begins in the next byte, in bits.
    code_at: u32,
}

/// Part of a field's representation, RFC 7541 §6.
#[derive(Clone, Copy, Default)]
enum FieldPart {
    /// Its first byte, which says what it is.
    #[default]
    Start,
    /// The rest of the index of a name that a value follows.
    NameIndex,
    /// The rest of an integer that nothing follows.
    Whole,
    /// The first byte of a name's length, or of a value's.
    NameLength,
    ValueLength,
    /// The rest of that length.
    MoreNameLength {
        is_coded: bool,
    },
    MoreValueLength {
        is_coded: bool,
    },
    /// The bytes of a name or value that are left.
    Name(usize),
    Value(usize),
    /// The same of an authority in a Huffman code.
    CodedValue(usize),
    /// It is not HPACK.
    Unknown,
}

impl Fields {
    /// Returns whether the next byte needs the one after it, of the `left` ones in the frame.
    fn waits(&self, left: usize) -> bool {
        self.is_authority && left > 1 && matches!(self.part, FieldPart::CodedValue(2..))
    }

    /// Follows the first of these bytes, and changes it if it is an authority's; a code may reach into the
    /// second.
    fn pass(&mut self, bytes: &mut [u8]) {
        use FieldPart::{
            CodedValue, MoreNameLength, MoreValueLength, Name, NameIndex, NameLength, Start, Unknown, Value,
            ValueLength, Whole,
        };
        if let CodedValue(left) = self.part {
            self.code(bytes, left);
            self.part = text(left, Start, CodedValue);
            return;
        }
        let [byte, ..] = bytes else { return };
        self.part = match self.part {
            Start => match *byte {
                0x80.. => self.integer(*byte, 7, Whole),
                0x40.. => self.integer(*byte, 6, NameIndex),
                0x20.. => self.integer(*byte, 5, Whole),
                _ => self.integer(*byte, 4, NameIndex),
            },
            NameLength => self.integer(*byte, 7, MoreNameLength { is_coded: *byte & 0x80 != 0 }),
            ValueLength => self.integer(*byte, 7, MoreValueLength { is_coded: *byte & 0x80 != 0 }),
            part @ (NameIndex | Whole | MoreNameLength { .. } | MoreValueLength { .. }) => {
                self.more(*byte, part)
            }
            Name(left) => {
                self.is_authority &= AUTHORITY.get(self.number - left) == Some(byte);
                text(left, ValueLength, Name)
            }
            Value(left) => {
                if self.is_authority && !(byte.is_ascii_alphanumeric() || b".-".contains(byte)) {
                    *byte = b'.';
                }
                text(left, Start, Value)
            }
            CodedValue(_) | Unknown => Unknown,
        };
    }

    /// Changes the codes that begin in the first byte.
    fn code(&mut self, bytes: &mut [u8], left: usize) {
        let (first, second) = match bytes {
            [first, second, ..] if left > 1 => (first, Some(second)),
            [first, ..] if left == 1 => (first, None),
            _ => {
                // The value goes on in another frame.
                self.is_authority = false;
                return;
            }
        };
        // What pads the last byte is ones.
        let mut window = u16::from_be_bytes([*first, second.as_ref().map_or(0xff, |second| **second)]);
        while self.is_authority && self.code_at < 8 {
            let [top, _] = (window << self.code_at).to_be_bytes();
            let length = match top {
                ..0x50 => 5,
                0x50..0xb8 => 6,
                0xb8..0xf8 => 7,
                0xf8..0xfe => 8,
                // Padding, or a character that is in no host and hardly in a path.
                _ => {
                    self.is_authority = false;
                    break;
                }
            };
            if length == 6 && CODES_OF_PATHS.contains(&(top >> 2)) {
                let place = 10 - self.code_at;
                window = (window & !(0x3f << place)) | (CODE_OF_DOT << place);
            }
            self.code_at += length;
        }
        self.code_at = self.code_at.saturating_sub(8);
        let [high, low] = window.to_be_bytes();
        *first = high;
        if let Some(second) = second {
            *second = low;
        }
    }

    /// Begins an integer in the low `bits` of a byte; `part` says what it is.
    fn integer(&mut self, byte: u8, bits: u32, part: FieldPart) -> FieldPart {
        let limit = (1 << bits) - 1;
        self.number = usize::from(byte) & limit;
        self.bits = 0;
        if self.number < limit { self.counted(part) } else { part }
    }

    /// Takes the next byte of an integer.
    fn more(&mut self, byte: u8, part: FieldPart) -> FieldPart {
        if self.bits >= INTEGER_BITS_MAX {
            return FieldPart::Unknown;
        }
        self.number += usize::from(byte & 0x7f) << self.bits;
        self.bits += 7;
        if byte & 0x80 == 0 { self.counted(part) } else { part }
    }

    /// Returns what follows an integer.
    fn counted(&mut self, part: FieldPart) -> FieldPart {
        match part {
            FieldPart::NameIndex => {
                self.is_authority = self.number == AUTHORITY_INDEX;
                if self.number == 0 { FieldPart::NameLength } else { FieldPart::ValueLength }
            }
            FieldPart::MoreNameLength { .. } if self.number == 0 => FieldPart::ValueLength,
            FieldPart::MoreNameLength { is_coded } => {
                self.is_authority = !is_coded && self.number == AUTHORITY.len();
                FieldPart::Name(self.number)
            }
            FieldPart::MoreValueLength { .. } if self.number == 0 => FieldPart::Start,
            FieldPart::MoreValueLength { is_coded: true } if self.is_authority => {
                self.code_at = 0;
                FieldPart::CodedValue(self.number)
            }
            FieldPart::MoreValueLength { .. } => FieldPart::Value(self.number),
            _ => FieldPart::Start,
        }
    }
}

/// Returns what follows a byte of a text that had `left` bytes left.
fn text(left: usize, after: FieldPart, same: fn(usize) -> FieldPart) -> FieldPart {
    if left > 1 { same(left - 1) } else { after }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn literal(first: u8, name: &str, value: &str) -> Vec<u8> {
        let text = |text: &str| {
            let length = u8::try_from(text.len()).unwrap();
            let length = if length < 127 { vec![length] } else { vec![127, length - 127] };
            [length, text.into()].concat()
        };
        let name = if name.is_empty() { vec![] } else { text(name) };
        [vec![first], name, text(value)].concat()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// A connection's bytes with this authority: indexed, literal and new names, in two frames with padding.
    fn connection(authority: &str) -> Vec<u8> {
        let fields = [
            vec![0x3f, 0xe1, 0x1f, 0x83, 0x86],
            literal(0x44, "", "/grpc.health.v1.Health/Check"),
            literal(0x41, "", authority),
            literal(0x40, ":authority", authority),
            literal(0x40, "x-path", "/a_b"),
            literal(0x00, ":authoritx", "/a_b"),
            literal(0x10, ":authority-x", "/a_b"),
            literal(0x0f, "", "")[..1].to_vec(),
            vec![0x10],
            literal(0x00, "", "/kept")[1..].to_vec(),
        ]
        .concat();
        let (first, rest) = fields.split_at(fields.len() - 30);
        let padded = [&[3][..], &[0, 0, 0, 0, 7], first, &[0; 3]].concat();
        [
            vec![b'/'; PREFACE_BYTES],
            frame(4, 0, &[]),
            frame(HEADERS, PADDED | PRIORITY, &padded),
            frame(CONTINUATION, 4, rest),
            frame(0, 0, &[0x41, 3, b'/', b'/', b'/']),
            frame(HEADERS, 5, &[0xbe, 0x83]),
        ]
        .concat()
    }

    fn pass(bytes: &[u8], pieces: &[usize]) -> Vec<u8> {
        let (mut frames, mut bytes, mut from) = (Frames::new(), bytes.to_vec(), 0);
        for piece in pieces.iter().copied().cycle() {
            // As a reader does: what waits comes again with the next bytes.
            let to = (from + piece).max(from + 2).min(bytes.len());
            from += if to == bytes.len() {
                frames.pass_all(&mut bytes[from..to])
            } else {
                frames.pass(&mut bytes[from..to])
            };
            if from == bytes.len() {
                return bytes;
            }
        }
        bytes
    }

    #[test]
    fn a_path_becomes_a_host_and_nothing_else_changes() {
        let long = "/tmp".repeat(40);
        for (sent, seen) in [
            ("%2Frun%2Fmlxd.sock", ".2Frun.2Fmlxd.sock"),
            ("/a/b_c", ".a.b.c"),
            ("localhost", "localhost"),
            (&long, &long.replace('/', ".")),
        ] {
            for pieces in [&[1][..], &[7, 2], &[1000]] {
                assert_eq!(pass(&connection(sent), pieces), connection(seen), "{sent}");
            }
            http::uri::Authority::try_from(seen).unwrap();
        }
    }

    #[test]
    fn a_path_in_a_huffman_code_becomes_a_host() {
        for (sent, seen) in [
            // `/run/mlxd_1.sock` and `.run.mlxd.1.sock`; `%2Frun%2Fmlxd.sock`; `localhost:50051`.
            ("62cb6a629a3cc9105741c9d7", "5ecb6a5e9a3cc8b85741c9d7"),
            ("54586cb6a545869a3cc8ba0e4ebf", "5c586cb6a5c5869a3cc8ba0e4ebf"),
            ("a0e41d139d09b8d800d87f", "a0e41d139d09b8d800d87f"),
            // `/~/x`: what follows the rare character is left.
            ("63ffac79", "5fffac79"),
        ] {
            let connection = |code: &str| {
                let code: Vec<u8> = (0..code.len())
                    .step_by(2)
                    .map(|at| u8::from_str_radix(&code[at..at + 2], 16).unwrap())
                    .collect();
                let length = 0x80 | u8::try_from(code.len()).unwrap();
                let block =
                    [&[0x41, length][..], &code[..], &[0x44, 0x82, 0x62, 0xcb], &[0x41, 2], b"/a"].concat();
                [vec![0; PREFACE_BYTES], frame(HEADERS, 4, &block)].concat()
            };
            let mut seen = connection(seen);
            let end = seen.len() - 2;
            seen[end] = b'.';
            for pieces in [&[1][..], &[5], &[3, 2], &[1000]] {
                assert_eq!(pass(&connection(sent), pieces), seen, "{sent} {pieces:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_pass_at_their_length_whatever_the_pieces(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            pieces in prop::collection::vec(1_usize..60, 1..5),
        ) {
            let begun = [vec![0; PREFACE_BYTES], vec![0, 1, 0, HEADERS, 0, 0, 0, 0, 1], bytes].concat();
            prop_assert_eq!(pass(&begun, &[1]), pass(&begun, &pieces));
        }
    }
}
