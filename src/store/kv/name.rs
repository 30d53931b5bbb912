//! Names of parts: each a hash of what the part holds, so that what has the same name is the same. Owner,
//! salt and fingerprint are hashed before the tokens: nobody finds another's part by its tokens.

use std::fmt;
use std::ops::Range;

use sha2::{Digest, Sha256};

use super::{Fingerprint, KvKey, KvOrigin};
use crate::backend::{KvArray, KvElement};

/// Format of the files. A larger one is never read, and a smaller one neither.
const FORMAT: u32 = 1;

/// End of the names of parts' files.
const ENDING: &str = ".safetensors";

/// Name of a part, or a hash that goes into such names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name(pub(super) [u8; 32]);

impl Name {
    /// Returns the name of its file.
    pub(super) fn file(self) -> String {
        format!("{self}{ENDING}")
    }

    /// Returns the part whose file has this name.
    pub(super) fn of_file(file: &str) -> Option<Self> {
        Self::parse(file.strip_suffix(ENDING)?)
    }

    /// Returns the name that a text of 64 hexadecimal digits is.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut name = Self([0; 32]);
        for (at, byte) in name.0.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        (name.to_string() == text).then_some(name)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What a part holds of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Keys and values of these tokens.
    Tokens(Range<u32>),
    /// The states after this many tokens.
    States(u32),
}

impl Piece {
    /// Returns the number of tokens up to its end.
    pub(super) fn end(&self) -> u32 {
        match self {
            Self::Tokens(tokens) => tokens.end,
            Self::States(length) => *length,
        }
    }
}

impl Fingerprint {
    /// Returns the fingerprint of caches that were computed so.
    #[must_use]
    pub fn of(origin: &KvOrigin<'_>) -> Self {
        let KvOrigin { revision, computes, layout } = origin;
        let mut hash = Sha256::new();
        hash.update(FORMAT.to_le_bytes());
        text(&mut hash, revision);
        text(&mut hash, computes);
        for array in &layout.arrays {
            let (kind, shape) = match array {
                KvArray::PerToken { heads, elements, .. } => (0, vec![*heads, *elements]),
                KvArray::PerSequence { shape, .. } => (1, shape.clone()),
            };
            hash.update([kind, code(array.element())]);
            hash.update((shape.len() as u64).to_le_bytes());
            shape.iter().for_each(|size| hash.update(size.to_le_bytes()));
        }
        Self(hash.finalize().into())
    }
}

fn code(element: KvElement) -> u8 {
    match element {
        KvElement::Float32 => 0,
        KvElement::Float16 => 1,
        KvElement::Bfloat16 => 2,
        KvElement::Int8 => 3,
    }
}

/// Hashes a text so that it cannot be confused with what follows.
fn text(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
}

/// Returns a hash of a key.
pub(super) fn key_name(key: &KvKey) -> Name {
    let KvKey { fingerprint, owner, salt } = key;
    let mut hash = Sha256::new();
    hash.update(fingerprint.0);
    text(&mut hash, owner.as_str());
    hash.update(salt);
    Name(hash.finalize().into())
}

/// Names the parts of a cache with some tokens, in the order of their ends.
pub(super) struct Naming<'a> {
    tokens: &'a [u32],
    hash: Sha256,
    /// Number of tokens that were hashed.
    hashed: usize,
}

impl<'a> Naming<'a> {
    /// Names parts of a key's cache of `tokens`.
    pub(super) fn new(key: Name, tokens: &'a [u32]) -> Self {
        Self { tokens, hash: Sha256::new_with_prefix(key.0), hashed: 0 }
    }

    /// Returns the name of a piece that ends where the last one did or later; none if it ends beyond the
    /// tokens.
    pub(super) fn name(&mut self, piece: &Piece) -> Option<Name> {
        let end = piece.end() as usize;
        self.hash(self.tokens.get(self.hashed..end)?);
        self.hashed = end;
        Some(finish(self.hash.clone(), piece))
    }

    /// Returns the name of a piece of the first tokens and these after them, where the last one ended.
    pub(super) fn name_with(&self, more: &[u32], piece: &Piece) -> Name {
        let mut with = Self { tokens: &[], hash: self.hash.clone(), hashed: 0 };
        with.hash(more);
        finish(with.hash, piece)
    }

    fn hash(&mut self, tokens: &[u32]) {
        let mut block = [0; 1024];
        for tokens in tokens.chunks(block.len() / size_of::<u32>()) {
            let bytes = &mut block[..size_of_val(tokens)];
            bytes
                .chunks_exact_mut(4)
                .zip(tokens)
                .for_each(|(to, token)| to.copy_from_slice(&token.to_le_bytes()));
            self.hash.update(bytes);
        }
    }
}

/// Returns the name of a piece after all tokens up to its end: its numbers say how many those are.
fn finish(mut hash: Sha256, piece: &Piece) -> Name {
    let (kind, start, end) = match piece {
        Piece::Tokens(tokens) => (0, tokens.start, tokens.end),
        Piece::States(length) => (1, *length, *length),
    };
    hash.update([kind]);
    hash.update(start.to_le_bytes());
    hash.update(end.to_le_bytes());
    Name(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::KvLayout;

    fn key(owner: &str, salt: u8, revision: &str) -> KvKey {
        let origin = KvOrigin { revision, computes: "f32", layout: &KvLayout::default() };
        KvKey { fingerprint: Fingerprint::of(&origin), owner: owner.into(), salt: [salt; 32] }
    }

    fn name(key: &KvKey, tokens: &[u32], piece: &Piece) -> Name {
        Naming::new(key_name(key), tokens).name(piece).unwrap()
    }

    #[test]
    fn parts_are_named_by_all_that_they_depend_on() {
        let (own, tokens) = (key("uid:1", 0, "a"), [1, 2, 3, 4]);
        let of = |start| Piece::Tokens(start..3);
        let names = [
            name(&own, &tokens, &of(0)),
            name(&own, &tokens, &of(1)),
            name(&own, &tokens, &Piece::States(3)),
            name(&own, &tokens, &Piece::Tokens(0..4)),
            name(&own, &[1, 9, 3], &of(0)),
            // The tokens before its own count too.
            name(&own, &[9, 2, 3], &of(1)),
            name(&key("uid:2", 0, "a"), &tokens, &of(0)),
            name(&key("uid:1", 1, "a"), &tokens, &of(0)),
            name(&key("uid:1", 0, "b"), &tokens, &of(0)),
        ];
        let different: std::collections::BTreeSet<Name> = names.into_iter().collect();
        assert_eq!(different.len(), names.len());
        assert_eq!(name(&own, &[1, 2, 3, 9], &of(0)), names[0]);
    }

    #[test]
    fn caches_are_alike_only_where_model_formats_and_arrays_are() {
        let array = |heads, elements, element| KvArray::PerToken { heads, elements, element };
        let state =
            |shape: &[u32]| KvArray::PerSequence { shape: shape.to_vec(), element: KvElement::Float32 };
        let layouts = [
            vec![],
            vec![array(1, 2, KvElement::Float16)],
            vec![array(2, 1, KvElement::Float16)],
            vec![array(1, 2, KvElement::Bfloat16)],
            vec![array(1, 2, KvElement::Float16), state(&[2])],
            vec![state(&[2]), array(1, 2, KvElement::Float16)],
            vec![state(&[1, 2])],
            vec![state(&[1]), state(&[2])],
        ];
        let mut different = std::collections::BTreeSet::new();
        for arrays in layouts {
            let layout = KvLayout { arrays };
            for (revision, computes) in [("a", "b"), ("ab", ""), ("a", "c")] {
                let origin = KvOrigin { revision, computes, layout: &layout };
                assert!(different.insert(Fingerprint::of(&origin).0), "{origin:?}");
            }
        }
    }

    #[test]
    fn names_are_the_same_whichever_parts_were_named_before() {
        let tokens: Vec<u32> = (0..1000).collect();
        let key = key("uid:1", 0, "a");
        let mut naming = Naming::new(key_name(&key), &tokens);
        for piece in [Piece::Tokens(0..300), Piece::States(300), Piece::Tokens(300..999)] {
            assert_eq!(naming.name(&piece), Some(name(&key, &tokens, &piece)));
        }
        assert_eq!(naming.name(&Piece::Tokens(999..1001)), None);
        let mut naming = Naming::new(key_name(&key), &tokens[..300]);
        naming.name(&Piece::States(300));
        let last = Piece::Tokens(300..999);
        assert_eq!(naming.name_with(&tokens[300..999], &last), name(&key, &tokens, &last));
    }

    #[test]
    fn a_name_is_read_back_as_it_was_written_only() {
        let name = Name([0xab; 32]);
        assert_eq!(Name::of_file(&name.file()), Some(name));
        let text = name.to_string();
        for other in
            [text.to_uppercase(), text[1..].to_owned(), format!("{text}0"), format!("+{}", &text[1..])]
        {
            assert_eq!(Name::parse(&other), None, "{other}");
        }
    }
}
