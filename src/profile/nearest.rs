//! "Did you mean": the nearest of the known words.

/// The candidate that takes the fewest edits to reach from `word`, if that is few enough to be a slip of the finger.
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let written: Vec<char> = word.to_lowercase().chars().take(64).collect();
    let limit = (written.len() / 3).clamp(1, 3);
    candidates
        .into_iter()
        // Each character more or less is an edit.
        .filter(|candidate| candidate.chars().count().abs_diff(written.len()) <= limit)
        .map(|candidate| (distance(&written, &candidate.to_lowercase().chars().collect::<Vec<_>>()), candidate))
        .filter(|&(edits, _)| edits <= limit)
        .min_by_key(|&(edits, _)| edits)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before_last = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let substitution = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = substitution.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before_last[j - 2] + 1);
            }
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_finds_its_word() {
        let words = ["mixed-port", "socks-port", "port", "proxies"];
        assert_eq!(nearest("mixd-port", words), Some("mixed-port"));
        assert_eq!(nearest("proxeis", words), Some("proxies"));
        assert_eq!(nearest("PORT", words), Some("port"));
    }

    #[test]
    fn a_word_of_its_own_finds_nothing() {
        assert_eq!(nearest("something-else", ["mixed-port", "port"]), None);
        assert_eq!(nearest("", ["mixed-port"]), None);
    }

    #[test]
    fn the_distance_counts_edits_and_swaps() {
        let count = |a: &str, b: &str| distance(&a.chars().collect::<Vec<_>>(), &b.chars().collect::<Vec<_>>());
        assert_eq!(count("", "abc"), 3);
        assert_eq!(count("abc", ""), 3);
        assert_eq!(count("kitten", "sitting"), 3);
        assert_eq!(count("prot", "port"), 1);
    }
}
