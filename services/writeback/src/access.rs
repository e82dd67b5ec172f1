//! Which volumes a client may use, by the name in its certificate: one rule for every front end.

use std::collections::BTreeMap;

/// Stands for every volume.
const EVERY_VOLUME: &str = "*";
/// Behind a volume: it may be read, and not changed.
const READ_ONLY: &str = "@ro";
/// Behind a volume: it may also be created, resized and deleted.
const MANAGE: &str = "@manage";

/// What a client may do with a volume. The greater one includes the smaller one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Read it.
    ReadOnly,
    /// Read and change it.
    ReadWrite,
    /// Also create, resize and delete it, which NBD has no words for.
    Manage,
}

/// Volume and access of one entry of a list: `volume`, `volume@ro`, `volume@manage`; `*` stands for
/// every volume. `None`: it is none.
fn parse(entry: &str) -> Option<(&str, Access)> {
    let (of, access) = match entry.split_once('@') {
        None => (entry, Access::ReadWrite),
        Some((of, _)) if entry.ends_with(READ_ONLY) => (of, Access::ReadOnly),
        Some((of, _)) if entry.ends_with(MANAGE) => (of, Access::Manage),
        Some(_) => return None,
    };
    let is_whole = entry.matches('@').count() <= 1 && !of.is_empty();
    is_whole.then_some((of, access))
}

/// The entries of a list that mean nothing, as `client: entry`.
pub(crate) fn faults(clients: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let entries = clients.iter().flat_map(|(who, list)| list.iter().map(move |entry| (who, entry)));
    let bad = entries.filter(|(_, entry)| parse(entry).is_none());
    bad.map(|(who, entry)| format!("{who}: {entry:?}")).collect()
}

/// What the holder of a certificate with this name (`None`: there is none) may do with a volume;
/// `None`: nothing.
///
/// `clients` has for each name what it may use: `volume`, `volume@ro`, `volume@manage`, and `*` for
/// every volume; of several that fit, the widest counts. Without any client in it, everybody may
/// read and change every volume.
pub fn access(
    clients: &BTreeMap<String, Vec<String>>,
    name: Option<&str>,
    volume: &str,
) -> Option<Access> {
    if clients.is_empty() {
        return Some(Access::ReadWrite);
    }
    let allowed = clients.get(name?)?.iter().filter_map(|entry| {
        let (of, access) = parse(entry)?;
        (of == EVERY_VOLUME || of == volume).then_some(access)
    });
    allowed.max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(list: &[(&str, &[&str])]) -> BTreeMap<String, Vec<String>> {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        list.iter().map(|(who, of)| ((*who).to_owned(), names(of))).collect()
    }

    #[test]
    fn a_client_uses_only_the_volumes_of_its_certificate() {
        let clients = clients(&[("alice", &["a", "b"]), ("admin", &["*"])]);
        let access = |name, volume| access(&clients, name, volume);
        assert_eq!(access(Some("alice"), "a"), Some(Access::ReadWrite));
        assert_eq!(access(Some("alice"), "c"), None);
        assert_eq!(access(Some("admin"), "c"), Some(Access::ReadWrite));
        assert_eq!(access(Some("mallory"), "a"), None);
        assert_eq!(access(None, "a"), None);
    }

    #[test]
    fn of_several_entries_the_widest_counts() {
        let clients = clients(&[("backup", &["*@ro", "scratch"]), ("reader", &["a@ro"])]);
        let access = |name, volume| access(&clients, Some(name), volume);
        assert_eq!(access("backup", "a"), Some(Access::ReadOnly));
        assert_eq!(access("backup", "scratch"), Some(Access::ReadWrite));
        assert_eq!(access("reader", "a"), Some(Access::ReadOnly));
        assert_eq!(access("reader", "b"), None);
    }

    #[test]
    fn an_entry_that_means_nothing_is_told_and_allows_nothing() {
        let good = clients(&[("alice", &["a", "a@ro", "a@manage", "*", "*@ro", "*@manage"])]);
        assert_eq!(faults(&good), Vec::<String>::new());
        let bad = ["", "@ro", "a@", "a@rw", "a@ro@ro", "a@b@manage", "a@ro "];
        let bad = clients(&[("alice", &bad)]);
        assert_eq!(faults(&bad).len(), 7);
        for volume in ["", "a", "a@", "a@ro", "a@b"] {
            assert_eq!(access(&bad, Some("alice"), volume), None, "{volume}");
        }
    }

    #[test]
    fn without_a_list_every_client_uses_every_volume() {
        assert_eq!(access(&BTreeMap::new(), None, "a"), Some(Access::ReadWrite));
    }
}
