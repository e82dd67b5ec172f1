//! What conversion has been told of the maps that reads use.
//!
//! A writeback with a hundred open volumes confirms their versions some times a second, and most of them have not
//! moved: those are left out. Conversion keeps what it was told as long as the session stands.

use std::collections::BTreeMap;

use endio_types::{Generation, MapVersion, VolumeId};

/// One confirmation: reads of the volume under this generation use this version of its map, or a newer one.
pub type Confirm = (VolumeId, Generation, MapVersion);

/// What was confirmed in one session. Each session begins with an empty one.
#[derive(Clone, Debug, Default)]
pub struct Confirms {
    told: BTreeMap<VolumeId, (Generation, MapVersion)>,
}

impl Confirms {
    /// What of `now`, which names every open volume, was not said in this session; from now on it counts as said.
    /// Whoever calls this must send it, or end the session.
    pub fn news(&mut self, now: impl IntoIterator<Item = Confirm>) -> Vec<Confirm> {
        let now =
            now.into_iter().map(|(volume, generation, version)| (volume, (generation, version)));
        let before = std::mem::replace(&mut self.told, now.collect());
        let is_news = |volume: &VolumeId, said| before.get(volume) != Some(said);
        let news = self.told.iter().filter(|(volume, said)| is_news(volume, said));
        news.map(|(volume, (generation, version))| (*volume, *generation, *version)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confirm(volume: u64, generation: u64, version: u64) -> Confirm {
        (VolumeId(volume), Generation(generation), MapVersion(version))
    }

    #[test]
    fn what_was_said_is_not_said_again() {
        let mut confirms = Confirms::default();
        let both = [confirm(1, 1, 5), confirm(2, 1, 9)];
        assert_eq!(confirms.news(both), both);
        assert_eq!(confirms.news(both), []);
        assert_eq!(confirms.news([confirm(1, 1, 6), confirm(2, 1, 9)]), [confirm(1, 1, 6)]);
    }

    /// Another generation begins with what conversion knew when it was opened.
    #[test]
    fn a_volume_that_is_opened_again_is_confirmed_again() {
        let mut confirms = Confirms::default();
        confirms.news([confirm(1, 1, 5)]);
        assert_eq!(confirms.news([]), []);
        assert_eq!(confirms.news([confirm(1, 1, 5)]), [confirm(1, 1, 5)]);
        assert_eq!(confirms.news([confirm(1, 2, 5)]), [confirm(1, 2, 5)]);
    }
}
