//! Who gets in, what they may do there, and what becomes of everybody else.

#[path = "security/agents.rs"]
mod agents;
#[path = "security/edges.rs"]
mod edges;
#[path = "security/expiry.rs"]
mod expiry;
#[path = "security/floods.rs"]
mod floods;
#[path = "security/manual.rs"]
mod manual;
#[path = "security/refusals.rs"]
mod refusals;
#[path = "security/roles.rs"]
mod roles;
#[path = "security/rude.rs"]
mod rude;
#[path = "security/site.rs"]
pub(crate) mod site;
#[path = "security/volumes.rs"]
mod volumes;
