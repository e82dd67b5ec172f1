//! Which volumes a client may use, by the name in its certificate: one rule for every front end.

use std::collections::BTreeMap;

/// Stands for every volume.
const EVERY_VOLUME: &str = "*";
/// Behind a volume: it may be read, and not changed.
const READ_ONLY: &str = "@ro";

/// What a client may do with a volume. The greater one includes the smaller one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Read it.
    ReadOnly,
    /// Read and change it.
    ReadWrite,
}

/// What the holder of a certificate with this common name (`None`: there is none) may do with a
/// volume; `None`: nothing.
///
/// `clients` has for each name what it may use: `volume`, `volume@ro`, `*` or `*@ro`; of several that
/// fit, the widest counts. Without any client in it, everybody may do everything.
pub fn access(
    clients: &BTreeMap<String, Vec<String>>,
    name: Option<&str>,
    volume: &str,
) -> Option<Access> {
    if clients.is_empty() {
        return Some(Access::ReadWrite);
    }
    let allowed = clients.get(name?)?.iter().filter_map(|entry| {
        let (of, access) = match entry.strip_suffix(READ_ONLY) {
            Some(of) => (of, Access::ReadOnly),
            None => (entry.as_str(), Access::ReadWrite),
        };
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
    fn without_a_list_every_client_uses_every_volume() {
        assert_eq!(access(&BTreeMap::new(), None, "a"), Some(Access::ReadWrite));
    }
}
