//! The CA of a small site.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use tidemark_identity::{Pattern, Role};

use crate::parse;

/// `tidemark pki …`.
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make a CA: a folder with its certificate and its key
    #[command(after_help = "\
Nothing is overwritten: a folder that has a CA is refused.

Example:
  tidemark pki init /root/tidemark-pki")]
    Init {
        /// The folder; made where it does not exist
        dir: PathBuf,
        /// Change nothing where the folder has a CA already
        #[arg(long)]
        if_missing: bool,
    },
    /// Give somebody a certificate, and say what they may do
    #[command(after_help = "\
Writes NAME.crt and NAME.key to the CA's folder, and NAME with its roles to identities.toml there; prints what to copy
where. A service that others connect to gets the names and addresses under which they do with --host; without a role it
is a service only, and nobody's client.

Roles: source (ships its own volumes, and nothing else), restorer (reads content), operator (looks after volumes, reads no
content), viewer (sees what there is). Volumes: VOLUME or SOURCE/VOLUME, with * for any number of characters.

Examples:
  tidemark pki issue vault --host vault.example.com --host 10.0.0.5
  tidemark pki issue edge-7 --role source --volume '*'
  tidemark pki issue desk --role restorer --role viewer --volume 'edge-7/*'
  tidemark pki issue edge-7 --renew                       a new certificate for the same key
  tidemark pki issue vault --host vault --if-missing --copy-to /etc/tidemark    may be run at each start")]
    Issue(PkiIssueArgs),
    /// Give somebody a token, and say what they may do
    #[command(after_help = "\
Writes the token to NAME.token in the CA's folder, and NAME with its roles and the token's SHA-256 to identities.toml
there. Whoever has the token is NAME.

Example:
  tidemark pki token dashboard --role viewer --volume '*'")]
    Token(PkiTokenArgs),
}

/// Who somebody is, and what they may do.
#[derive(Debug, Args)]
pub struct PkiGrant {
    /// Who it is for; a certificate has it as its first DNS name
    pub name: String,
    /// The CA's folder
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// What they are: source, restorer, operator or viewer; may be given several times
    #[arg(long, value_name = "ROLE", value_parser = parse::role)]
    pub role: Vec<Role>,
    /// For which volumes: VOLUME or SOURCE/VOLUME, * is any text; may be given several times
    #[arg(long, value_name = "PATTERN")]
    pub volume: Vec<Pattern>,
}

/// `tidemark pki issue`.
#[derive(Debug, Args)]
pub struct PkiIssueArgs {
    /// Who, and what they may do
    #[command(flatten)]
    pub grant: PkiGrant,
    /// A name or address under which others connect to it; may be given several times
    #[arg(long, value_name = "HOST")]
    pub host: Vec<String>,
    /// How long it is valid, from now on; whole days
    #[arg(long, value_name = "TIME", default_value = "365d", value_parser = parse::duration)]
    pub valid: Duration,
    /// Replace the certificate of NAME by a new one for the same key
    #[arg(long, conflicts_with = "if_missing")]
    pub renew: bool,
    /// Keep the certificate of NAME where there is one, whoever and whatever it is for
    #[arg(long)]
    pub if_missing: bool,
    /// Copy what NAME needs to this folder as well: ca.crt, NAME.crt, NAME.key, and to a service (--host) the identities
    #[arg(long, value_name = "DIR")]
    pub copy_to: Option<PathBuf>,
}

/// `tidemark pki token`.
#[derive(Debug, Args)]
pub struct PkiTokenArgs {
    /// Who, and what they may do
    #[command(flatten)]
    pub grant: PkiGrant,
}
