//! Names of exports: a volume, and how it is opened.
//!
//! | name | how |
//! |---|---|
//! | `vol1` | any number of connections |
//! | `vol1@single` | one connection: a new one under this name cuts off the older one |
//! | `vol1@ro` | read-only |

/// What stands between a volume and how it is opened; no volume has it in its name.
const MARK: char = '@';

/// How a volume is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum How {
    /// Any number of connections.
    #[default]
    Shared,
    /// One connection at a time.
    Single,
    /// Without changes.
    ReadOnly,
}

/// The volume, and how it is opened; `None`: there is no such way.
pub(super) fn parse(export: &str) -> Option<(&str, How)> {
    match export.split_once(MARK) {
        None => Some((export, How::Shared)),
        Some((volume, "single")) => Some((volume, How::Single)),
        Some((volume, "ro")) => Some((volume, How::ReadOnly)),
        Some(_) => None,
    }
}

/// The name under which an export is known, also if a client asked for the default one.
pub(super) fn canonical(volume: &str, how: How) -> String {
    match how {
        How::Shared => volume.to_owned(),
        How::Single => format!("{volume}{MARK}single"),
        How::ReadOnly => format!("{volume}{MARK}ro"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_how_its_volume_is_opened() {
        for how in [How::Shared, How::Single, How::ReadOnly] {
            assert_eq!(parse(&canonical("v-1.x", how)), Some(("v-1.x", how)));
        }
        assert_eq!(parse("@ro"), Some(("", How::ReadOnly)));
        for unknown in ["v@", "v@rw", "v@ro@single", "v@RO"] {
            assert_eq!(parse(unknown), None, "{unknown}");
        }
    }
}
