//! Which members a command is about: by role, by name, by asking (cli.md §2.2).

use std::collections::BTreeSet;

use trunkline_common::cluster::LeaderKey;
use trunkline_common::{ClusterView, Member};

use super::args::Role;
use super::context::Cluster;
use super::error::{CtlError, Result};
use super::list::show_members;
use super::output::Format;
use super::prompt::{ask, confirm};
use super::text::quoted;

/// A member with its name. A leader without member key is one, too, but nothing is known of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    /// Its name.
    pub name: String,
    /// Its key.
    pub member: Member,
}

/// The members with a role, in the order of their names.
pub(super) fn with_role(cluster: &Cluster, role: Role) -> Vec<Node> {
    cluster.views().flat_map(|view| of_view(view, role)).collect()
}

/// The first member with a role, or the named one.
///
/// # Errors
/// Both are given.
pub(super) fn any_member(cluster: &Cluster, role: Option<Role>, name: Option<&str>) -> Result<Option<Node>> {
    let role = match (role, name) {
        (Some(_), Some(_)) => return Err(CtlError::new("--role and --member are mutually exclusive options")),
        (None, Some(_)) => Role::Any,
        (role, None) => role.unwrap_or(Role::Leader),
    };
    Ok(with_role(cluster, role).into_iter().find(|node| name.is_none_or(|name| node.name == name)))
}

/// Members with a REST API, the leader first.
pub(super) fn leader_first(view: &ClusterView) -> Vec<Node> {
    let mut nodes = of_view(view, Role::Leader);
    nodes.extend(of_view(view, Role::Replica));
    nodes.retain(|node| node.member.api_url.is_some());
    nodes
}

/// How members are chosen.
pub(super) struct Choice<'a> {
    /// Given names; empty: all.
    pub names: &'a [String],
    /// Only these.
    pub role: Role,
    /// Don't ask.
    pub force: bool,
    /// The verb in questions.
    pub action: &'a str,
    /// The role stands in quotes in the message.
    pub quote_role: bool,
}

/// Shows the table and chooses members; does not ask for confirmation.
pub(super) fn choose(cluster: &Cluster, choice: &Choice<'_>) -> Result<Vec<Node>> {
    let nodes = with_role(cluster, choice.role);
    let candidates: BTreeSet<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
    if choice.names.is_empty() && candidates.is_empty() {
        return Err(CtlError::new(format!("{} cluster doesn't have any members", cluster.name)));
    }
    show_members(cluster, false, Format::Pretty)?;

    let mut names: BTreeSet<String> = choice.names.iter().cloned().collect();
    if !names.is_empty() {
        names.retain(|name| candidates.contains(name.as_str()));
        if names.is_empty() {
            let role = choice.role.as_str();
            let role = if choice.quote_role { quoted(role) } else { role.to_owned() };
            return Err(CtlError::new(format!("No {role} among provided members")));
        }
    } else if choice.action != "reinitialize" {
        names = candidates.iter().map(|name| (*name).to_owned()).collect();
    }
    if names.is_empty() && !choice.force {
        let listed = candidates.iter().copied().collect::<Vec<_>>().join(", ");
        names.insert(ask(&format!("Which member do you want to {} [{listed}]?", choice.action), Some(""))?);
    }
    if let Some(stranger) = names.iter().find(|name| !candidates.contains(name.as_str())) {
        return Err(CtlError::new(format!("{stranger} is not a member of cluster")));
    }
    Ok(nodes.into_iter().filter(|node| names.contains(&node.name)).collect())
}

/// Asks whether to do it now.
pub(super) fn confirm_now(nodes: &[Node], force: bool, action: &str) -> Result<()> {
    if force || confirm(&format!("Are you sure you want to {action} members {}?", names_of(nodes)))? {
        return Ok(());
    }
    Err(CtlError::new(format!("Aborted {action}")))
}

/// `a, b, c`.
pub(super) fn names_of(nodes: &[Node]) -> String {
    nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn of_view(view: &ClusterView, role: Role) -> Vec<Node> {
    let leader = view.leader.as_ref().filter(|leader| !leader.name.as_str().is_empty());
    match role {
        Role::Leader | Role::Primary | Role::StandbyLeader => leader
            .map(|leader| leader_node(view, leader))
            .filter(|node| leads_as(&node.member, role))
            .into_iter()
            .collect(),
        Role::Replica | Role::Standby | Role::Any => {
            let wanted = |name| role == Role::Any || !view.is_leader(name);
            let node = |(name, member): (&trunkline_common::MemberName, &Member)| Node {
                name: name.to_string(),
                member: member.clone(),
            };
            view.members.iter().filter(|(name, _)| wanted(name)).map(node).collect()
        }
    }
}

fn leader_node(view: &ClusterView, leader: &LeaderKey) -> Node {
    Node { name: leader.name.to_string(), member: view.leader_member().cloned().unwrap_or_default() }
}

/// Whether the holder of the leader key leads in this role: what the member says of itself decides, and where it says
/// neither it counts as both.
fn leads_as(member: &Member, role: Role) -> bool {
    match role {
        Role::Primary => member.role != "standby_leader",
        Role::StandbyLeader => !matches!(member.role.as_str(), "primary" | "master"),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use trunkline_common::{LeaseId, MemberName, Revision};

    use super::*;

    fn cluster(leader: Option<&str>, members: &[(&str, &str)]) -> Cluster {
        let member = |role: &str| Member { role: role.to_owned(), ..Member::default() };
        let view = ClusterView {
            leader: leader.map(|name| LeaderKey {
                name: name.into(),
                lease: LeaseId(1),
                created: Revision(1),
                modified: Revision(1),
            }),
            members: members.iter().map(|(name, role)| (MemberName::from(*name), member(role))).collect(),
            ..ClusterView::default()
        };
        Cluster { name: "demo".to_owned(), citus: None, view, workers: BTreeMap::new() }
    }

    fn names(cluster: &Cluster, role: Role) -> String {
        names_of(&with_role(cluster, role))
    }

    #[test]
    fn roles_choose_as_in_patronictl() {
        let plain = cluster(Some("a"), &[("a", "primary"), ("b", "replica"), ("c", "replica")]);
        let standby = cluster(Some("a"), &[("a", "standby_leader"), ("b", "replica")]);
        let starting = cluster(Some("a"), &[("a", "replica"), ("b", "replica")]);
        let leaderless = cluster(None, &[("b", "replica")]);
        let unknown = cluster(Some("x"), &[("b", "replica")]);
        let table = [
            (&plain, ["a", "a", "", "b, c", "b, c", "a, b, c"]),
            (&standby, ["a", "", "a", "b", "b", "a, b"]),
            (&starting, ["a", "a", "a", "b", "b", "a, b"]),
            (&leaderless, ["", "", "", "b", "b", "b"]),
            (&unknown, ["x", "x", "x", "b", "b", "b"]),
        ];
        let roles = [Role::Leader, Role::Primary, Role::StandbyLeader, Role::Replica, Role::Standby, Role::Any];
        for (cluster, expected) in table {
            assert_eq!(roles.map(|role| names(cluster, role)), expected.map(str::to_owned));
        }
    }

    #[test]
    fn one_member_is_the_leader_unless_asked_otherwise() {
        let cluster = cluster(Some("b"), &[("a", "replica"), ("b", "primary")]);
        let name = |role, name| any_member(&cluster, role, name).unwrap().map(|node| node.name);
        assert_eq!(name(None, None).as_deref(), Some("b"));
        assert_eq!(name(None, Some("a")).as_deref(), Some("a"));
        assert_eq!(name(Some(Role::Replica), None).as_deref(), Some("a"));
        assert_eq!(name(None, Some("x")), None);
        assert!(any_member(&cluster, Some(Role::Any), Some("a")).is_err());
    }
}
