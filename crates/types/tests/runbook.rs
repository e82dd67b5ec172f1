//! Every reason has an entry in the operator's guide, and the guide names no other.
#![allow(missing_docs)]

use endio_types::Reason;

const GUIDE: &str = include_str!("../../../docs/OPERATIONS.md");

#[test]
fn every_reason_has_an_entry_in_the_guide_and_no_entry_is_left_over() {
    let entries = GUIDE.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'));
    let mut entries: Vec<&str> = entries.collect();
    let mut reasons: Vec<&str> = Reason::ALL.iter().map(|reason| reason.name()).collect();
    entries.sort_unstable();
    reasons.sort_unstable();
    assert_eq!(entries, reasons);
}

#[test]
fn every_entry_says_something() {
    for reason in Reason::ALL {
        let head = format!("### `{reason}`\n");
        let text = GUIDE.split(&head).nth(1).and_then(|rest| rest.split("\n### ").next());
        assert!(text.is_some_and(|text| text.trim().len() > 20), "{reason} has an empty entry");
    }
}
