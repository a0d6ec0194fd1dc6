//! Patterns over names that policies may use: `*` is anything, `?` one character, `#` one hexadecimal digit.

/// Whether `pattern` covers all of `text`.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    covers_all(&pattern, &text, '*', covers)
}

/// Whether `pattern` covers all of `text`, which need not be text: over octets, and without `#`, which paths may have.
pub(crate) fn matches_octets(pattern: &[u8], text: &[u8]) -> bool {
    covers_all(pattern, text, b'*', |wanted, found| wanted == b'?' || wanted == found)
}

/// Time grows with the product of both lengths, never faster.
fn covers_all<T: Copy + PartialEq>(pattern: &[T], text: &[T], any: T, covers: impl Fn(T, T) -> bool) -> bool {
    let (mut at, mut read) = (0, 0);
    // Where the last `*` stands, and how much of the text it has been given.
    let mut star: Option<(usize, usize)> = None;
    while read < text.len() {
        match pattern.get(at) {
            Some(wanted) if *wanted == any => {
                star = Some((at, read));
                at += 1;
            }
            Some(wanted) if covers(*wanted, text[read]) => {
                at += 1;
                read += 1;
            }
            Some(_) | None => match star {
                Some((place, given)) => {
                    star = Some((place, given + 1));
                    (at, read) = (place + 1, given + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|rest| *rest == any)
}

fn covers(wanted: char, found: char) -> bool {
    match wanted {
        '?' => true,
        '#' => found.is_ascii_hexdigit(),
        exact => exact == found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_cover_what_they_say() {
        for (pattern, text, covered) in [
            ("Boot####", "Boot0001", true),
            ("Boot####", "BootOrder", false),
            ("Boot####", "Boot00011", false),
            ("*/MAC(*,0x1)/IPv4(*)", "PciRoot(0x0)/Pci(0x2,0x0)/MAC(525400000001,0x1)/IPv4(0.0.0.0)", true),
            ("*/MAC(*)", "PciRoot(0x0)/Pci(0x2,0x0)/HD(1,MBR)", false),
            // `*` knows no parts of a path: what a boot entry's URI says can look like one.
            ("*/MAC(*)", "PciRoot(0x0)/Pci(0x2,0x0)/Uri(http://a/MAC(1)/x)", true),
            ("n?", "n1", true),
            ("n?", "n", false),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a*b*c", "a1b2b3c", true),
            ("a*b*c", "a1b2b3", false),
        ] {
            assert_eq!(matches(pattern, text), covered, "{pattern} over {text}");
        }
    }

    #[test]
    fn a_hostile_pattern_takes_no_time() {
        let pattern = "*a".repeat(100) + "b";
        assert!(!matches(&pattern, &"a".repeat(10_000)));
    }

    proptest! {
        #[test]
        fn text_without_signs_covers_itself_alone(text in "[a-z(),/0-9]{0,20}", other in "[a-z(),/0-9]{0,20}") {
            prop_assert!(matches(&text, &text));
            prop_assert_eq!(matches(&text, &other), text == other);
            let around = format!("*{}*", text);
            let whole = format!("{}{}{}", other, text, other);
            prop_assert!(matches(&around, &whole));
        }
    }
}
