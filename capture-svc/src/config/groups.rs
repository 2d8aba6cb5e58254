//! Groups of volumes that are cut at one instant.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

/// Names of groups with the names of their volumes; by default none. No volume is in two groups, and each group has two
/// volumes at least.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Groups(BTreeMap<String, BTreeSet<String>>);

impl Groups {
    /// Each group with its volumes.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &BTreeSet<String>)> {
        self.0.iter().map(|(name, volumes)| (&**name, volumes))
    }

    /// The group that a volume is in.
    #[must_use]
    pub fn of(&self, volume: &str) -> Option<&str> {
        let mut groups = self.iter();
        groups
            .find(|(_, volumes)| volumes.contains(volume))
            .map(|(name, _)| name)
    }

    fn check(self) -> Result<Self, String> {
        let mut seen = BTreeSet::new();
        for (name, volumes) in self.iter() {
            if name.is_empty() {
                return Err("a group has no name: write NAME=VOLUME,VOLUME".to_owned());
            }
            if volumes.len() < 2 {
                return Err(format!(
                    "group {name} has {} volume(s): give it two at least",
                    volumes.len()
                ));
            }
            if let Some(twice) = volumes.iter().find(|volume| !seen.insert(*volume)) {
                return Err(format!(
                    "volume {twice:?} is in two groups: leave it in one"
                ));
            }
        }
        Ok(self)
    }
}

impl FromStr for Groups {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut groups = BTreeMap::new();
        for part in text
            .split(';')
            .map(str::trim)
            .filter(|part| !part.is_empty())
        {
            let (name, volumes) = part.split_once('=').ok_or_else(|| {
                format!("{part:?} is no group: write NAME=VOLUME,VOLUME; NAME=VOLUME,VOLUME")
            })?;
            let volumes = volumes.split(',').map(|volume| volume.trim().to_owned());
            let volumes = volumes.filter(|volume| !volume.is_empty()).collect();
            if groups.insert(name.trim().to_owned(), volumes).is_some() {
                return Err(format!("group {} is there twice", name.trim()));
            }
        }
        Self(groups).check()
    }
}

impl<'de> Deserialize<'de> for Groups {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "no groups: write \"NAME=VOLUME,VOLUME\", or NAME = [\"VOLUME\", \"VOLUME\"] in a table"
        )]
        enum Raw {
            Text(String),
            Table(BTreeMap<String, BTreeSet<String>>),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Text(text) => text.parse(),
            Raw::Table(groups) => Self(groups).check(),
        }
        .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read_from_a_line_and_a_volume_finds_its_own() {
        let groups: Groups = "db = data, wal; mail=spool,index;".parse().unwrap();
        let listed: Vec<_> = groups.iter().map(|(name, of)| (name, of.len())).collect();
        assert_eq!(listed, [("db", 2), ("mail", 2)]);
        assert_eq!(groups.of("wal"), Some("db"));
        assert_eq!(groups.of("other"), None);
        assert_eq!("".parse(), Ok(Groups::default()));
    }

    #[test]
    fn a_group_that_can_not_be_meant_is_named() {
        for (text, told) in [
            ("db", "no group"),
            ("db=data", "two at least"),
            ("db=data,data", "two at least"),
            ("=data,wal", "no name"),
            ("db=data,wal; db=a,b", "twice"),
            ("db=data,wal; mail=wal,index", "\"wal\" is in two groups"),
        ] {
            let error = text.parse::<Groups>().unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
