//! A file makes the session that it was made of, in whatever pieces it comes; anything else makes none.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::*;
use crate::ids::{SessionId, SessionKey};
use crate::session::{
    InputKind, Labels, Message, Role, Session, Snapshot, Terms, TurnContent, TurnId, TurnRequest,
};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;
const LIMIT: usize = 1 << 20;

fn session(text: &str) -> Snapshot {
    let key = SessionKey { owner: "uid:1".into(), name: "s".into() };
    let labels = Arc::new(Labels::from([("a".to_owned(), "b".to_owned())]));
    let terms = Terms { labels, ..Terms::after_use(Duration::from_secs(9)) };
    let mut session = Session::new(key, "m".into(), terms, NOW);
    let request = TurnRequest {
        model: None,
        input: InputKind::Chat,
        expected_token_count: None,
        input_bytes: 0,
        history: None,
    };
    session.begin(TurnId(1), &request, NOW).unwrap();
    let messages = vec![Message::text(Role::User, text)];
    let content = TurnContent::Chat { messages, text: Some(text.into()), text_is_whole: true, answer: None };
    session.commit(TurnId(1), [1, 2, 3].into(), content, NOW);
    session.snapshot()
}

fn file(session: &Snapshot) -> Vec<u8> {
    Export::new(&session.outline, session.contents.clone().unwrap()).flatten().collect()
}

fn read(file: &[u8], piece: usize, limit: usize) -> Result<(Outline, Contents), PortableError> {
    let mut import = Import::new(limit);
    for bytes in file.chunks(piece) {
        import.add(bytes)?;
    }
    import.finish()
}

#[test]
fn a_file_makes_the_session_whatever_the_pieces_it_comes_in() {
    let session = session(&"x".repeat(600 << 10));
    let file = file(&session);
    for piece in [1000, 65_536, file.len()] {
        let (outline, contents) = read(&file, piece, 2 * LIMIT).unwrap();
        assert_eq!(Some(&contents), session.contents.as_ref());
        assert_eq!((outline.id, outline.key.owner.as_str()), (SessionId(0), ""), "it is nobody's");
        assert_eq!(
            (outline.terms, outline.turns),
            (session.outline.terms.clone(), session.outline.turns.clone())
        );
    }
    let short = self::session("one");
    assert_eq!(Some(read(&self::file(&short), 1, LIMIT).unwrap().1), short.contents);
}

#[test]
fn a_file_that_ends_too_early_or_late_is_refused() {
    let file = file(&session("one"));
    for size in 0..file.len() {
        assert_eq!(read(&file[..size], 7, LIMIT).err(), Some(PortableError::Incomplete), "{size}");
    }
    let longer = [&file[..], &[0]].concat();
    assert_eq!(read(&longer, 7, LIMIT).err(), Some(PortableError::Overlong));
    let twice = [&file[..], &file].concat();
    assert_eq!(read(&twice, 7, LIMIT).err(), Some(PortableError::Overlong));
}

#[test]
fn a_file_with_any_flipped_bit_is_refused() {
    let file = file(&session("one"));
    for at in 0..file.len() {
        for bit in 0..8 {
            let mut flipped = file.clone();
            flipped[at] ^= 1 << bit;
            assert!(read(&flipped, 64, LIMIT).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn a_file_of_a_newer_format_is_known_as_one() {
    let mut file = file(&session("one"));
    file[MAGIC.len()] = 3;
    assert_eq!(read(&file, 5, LIMIT).err(), Some(PortableError::Format { found: 3, known: 2 }));
    assert_eq!(read(b"a file of something else", 5, LIMIT).err(), Some(PortableError::Foreign));
}

#[test]
fn a_file_of_the_older_format_is_read() {
    let session = session("one");
    let mut file = file(&session);
    file[MAGIC.len()] = 1;
    assert_eq!(Some(read(&file, 5, LIMIT).unwrap().1), session.contents);
}

#[test]
fn sizes_beyond_the_limit_are_refused_before_memory_is_taken() {
    let start = [&MAGIC[..], &FORMAT.to_le_bytes()].concat();
    for (outline, content) in [(u64::MAX, u64::MAX), (1 << 40, 0), (0, 1 << 40), (u64::MAX, 1)] {
        let header = [&b"mlx1"[..], &outline.to_le_bytes(), &content.to_le_bytes(), &[0; 48]].concat();
        let mut import = Import::new(LIMIT);
        import.add(&start).unwrap();
        assert_eq!(import.add(&header), Err(PortableError::Damaged { at: 16 }), "{outline} {content}");
    }
    // A frame of a size that may be, which never ends.
    let header = [&b"mlx1"[..], &10_u64.to_le_bytes(), &(LIMIT as u64).to_le_bytes(), &[0; 48]].concat();
    let mut import = Import::new(LIMIT);
    import.add(&start).unwrap();
    import.add(&header).unwrap();
    assert!(import.bytes() < 200);
    let endless = std::iter::repeat_n([0; 4096], 1000);
    let refused = endless.map(|bytes| import.add(&bytes)).find(Result::is_err);
    assert!(matches!(refused, Some(Err(PortableError::Damaged { .. }))), "{refused:?}");
}

#[test]
fn a_session_above_the_limit_is_refused_while_it_comes() {
    let file = file(&session(&"x".repeat(600 << 10)));
    let limit_bytes = 700 << 10;
    let mut import = Import::new(limit_bytes);
    let mut sent = 0;
    let refused = file.chunks(4096).find_map(|bytes| {
        sent += bytes.len();
        import.add(bytes).err()
    });
    assert_eq!(refused, Some(PortableError::TooLarge { limit_bytes }));
    assert!(sent < file.len());
}
