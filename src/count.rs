//! Counts: those that leave the daemon, or stand beside such, have 32 bits.

/// Saturates: a count that does not fit is beyond every limit.
#[must_use]
pub fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Returns the number of elements that two slices begin with in common.
#[must_use]
pub fn common_start<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    /// Elements compared at once, which takes a small part of the time.
    const BLOCK: usize = 64;
    let least = a.len().min(b.len());
    let (a, b) = (&a[..least], &b[..least]);
    if a == b {
        return least;
    }
    let blocks = a.chunks_exact(BLOCK).zip(b.chunks_exact(BLOCK)).take_while(|(a, b)| a == b).count() * BLOCK;
    blocks + a[blocks..].iter().zip(&b[blocks..]).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_part_where_their_elements_do() {
        let all: Vec<u32> = (0..300).collect();
        for at in [0, 1, 63, 64, 65, 200, 299] {
            let mut other = all.clone();
            other[at] += 1;
            assert_eq!((common_start(&all, &other), common_start(&all[..at], &all)), (at, at));
        }
        assert_eq!(common_start(&all, &all), 300);
        assert_eq!(common_start::<u32>(&[], &[]), 0);
    }
}
