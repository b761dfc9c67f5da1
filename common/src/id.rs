//! Names and numbers that must not be mixed up with each other.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The name of a member of the cluster, as in `name:` of its configuration and in `members/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemberName(pub String);

impl MemberName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Equality as the `sync` key has it: PostgreSQL folds `application_name`s, so case does not count there.
    pub fn matches(&self, other: &str) -> bool {
        self.0.eq_ignore_ascii_case(other)
    }

    /// The replication slot that belongs to this member (Patroni's `slot_name_from_member_name`): lower case, `-` and
    /// `.` become `_`, any other character outside `[a-z0-9_]` becomes `uNNNN`, cut to 63 characters.
    pub fn slot_name(&self) -> String {
        let mut slot = String::new();
        for c in self.0.to_lowercase().chars() {
            match c {
                'a'..='z' | '0'..='9' | '_' => slot.push(c),
                '-' | '.' => slot.push('_'),
                _ => slot.push_str(&format!("u{:04}", u32::from(c))),
            }
        }
        slot.truncate(63);
        slot
    }
}

impl From<&str> for MemberName {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// PostgreSQL's system identifier: decided by initdb, shared by every copy of the data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A revision of the DCS's store: grows with every write anywhere in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub i64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lease granted by the DCS. 0 is "no lease" (etcd's convention for a key without one).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_names_follow_patroni() {
        for (name, slot) in [("pg-a.1", "pg_a_1"), ("Node_A", "node_a"), ("a b", "au0032b"), ("é", "u0233")] {
            assert_eq!(MemberName::from(name).slot_name(), slot);
        }
        assert_eq!(MemberName("x".repeat(80)).slot_name().len(), 63);
    }
}
