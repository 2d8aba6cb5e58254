//! Options of the handshake: what a client asks, and the bytes of our answers. Pure functions over bytes.

use super::field::{Fields, text};
use super::wire::{
    BASE_ALLOCATION, NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME,
    NBD_OPT_ABORT, NBD_OPT_EXPORT_NAME, NBD_OPT_GO, NBD_OPT_INFO, NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, NBD_OPT_STRUCTURED_REPLY, NBD_REP_INFO,
    NBD_REP_META_CONTEXT, NBD_REP_SERVER, OPTION_REPLY_MAGIC,
};
use crate::exports::EXPORT_NAME_MAX;

/// What a client asks by one option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionRequest<'a> {
    /// Go on to transmission, in the old way: no reply but the export's data, or a closed connection.
    ExportName(&'a str),
    /// Close, politely.
    Abort,
    /// List the exports.
    List,
    /// Describe an export.
    Info(InfoRequest<'a>),
    /// Describe an export and go on to transmission.
    Go(InfoRequest<'a>),
    /// Use structured replies.
    StructuredReply,
    /// Which metadata contexts are there?
    ListMetaContext(MetaRequest<'a>),
    /// Use these metadata contexts.
    SetMetaContext(MetaRequest<'a>),
    /// A number that we don't know.
    Unknown,
}

/// The body of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export.
    pub name: &'a str,
    /// Its name was asked for.
    pub wants_name: bool,
    /// Its description was asked for.
    pub wants_description: bool,
    /// Its block sizes were asked for.
    pub wants_block_size: bool,
}

/// The body of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// The export.
    pub name: &'a str,
    /// How many queries came.
    pub queries: u32,
    /// One of them is exactly `base:allocation`.
    pub names_base_allocation: bool,
    /// One of them is `base:`, the whole namespace (which has a meaning in a listing only).
    pub names_base_namespace: bool,
}

/// The option's data contradicts itself or the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed data of option {option}")]
pub struct MalformedOption {
    /// `NBD_OPT_*`.
    pub option: u32,
}

/// Reads one option.
///
/// # Errors
/// [`MalformedOption`], to be answered with `NBD_REP_ERR_INVALID`; the stream is still in step.
pub fn decode(option: u32, data: &[u8]) -> Result<OptionRequest<'_>, MalformedOption> {
    decode_fields(option, data).ok_or(MalformedOption { option })
}

fn decode_fields(option: u32, data: &[u8]) -> Option<OptionRequest<'_>> {
    let empty = |request| data.is_empty().then_some(request);
    match option {
        NBD_OPT_EXPORT_NAME => Some(OptionRequest::ExportName(text(data, EXPORT_NAME_MAX)?)),
        // The specification lets the data of an abort be ignored.
        NBD_OPT_ABORT => Some(OptionRequest::Abort),
        NBD_OPT_LIST => empty(OptionRequest::List),
        NBD_OPT_STRUCTURED_REPLY => empty(OptionRequest::StructuredReply),
        NBD_OPT_INFO => Some(OptionRequest::Info(decode_info(data)?)),
        NBD_OPT_GO => Some(OptionRequest::Go(decode_info(data)?)),
        NBD_OPT_LIST_META_CONTEXT => Some(OptionRequest::ListMetaContext(decode_meta(data)?)),
        NBD_OPT_SET_META_CONTEXT => Some(OptionRequest::SetMetaContext(decode_meta(data)?)),
        _ => Some(OptionRequest::Unknown),
    }
}

fn decode_info(data: &[u8]) -> Option<InfoRequest<'_>> {
    let mut fields = Fields(data);
    let name = fields.string(EXPORT_NAME_MAX)?;
    let mut request = InfoRequest {
        name,
        wants_name: false,
        wants_description: false,
        wants_block_size: false,
    };
    for _ in 0..fields.u16()? {
        match fields.u16()? {
            NBD_INFO_NAME => request.wants_name = true,
            NBD_INFO_DESCRIPTION => request.wants_description = true,
            NBD_INFO_BLOCK_SIZE => request.wants_block_size = true,
            _ => {}
        }
    }
    fields.end()?;
    Some(request)
}

fn decode_meta(data: &[u8]) -> Option<MetaRequest<'_>> {
    let mut fields = Fields(data);
    let name = fields.string(EXPORT_NAME_MAX)?;
    let queries = fields.u32()?;
    let mut request = MetaRequest {
        name,
        queries,
        names_base_allocation: false,
        names_base_namespace: false,
    };
    for _ in 0..queries {
        match fields.string(EXPORT_NAME_MAX)? {
            BASE_ALLOCATION => request.names_base_allocation = true,
            "base:" => request.names_base_namespace = true,
            _ => {}
        }
    }
    fields.end()?;
    Some(request)
}

/// Appends one reply to an option: `reply` is `NBD_REP_*`, `parts` its data.
pub fn encode_reply(out: &mut Vec<u8>, option: u32, reply: u32, parts: &[&[u8]]) {
    // Callers' parts are names, descriptions and fixed fields: far below 4 GiB.
    let length = u32::try_from(parts.iter().map(|part| part.len()).sum::<usize>()).unwrap_or(0);
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&reply.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Appends `NBD_REP_SERVER`: one export of a listing.
pub fn encode_server(out: &mut Vec<u8>, name: &str, description: &str) {
    let length = u32::try_from(name.len()).unwrap_or(0).to_be_bytes();
    encode_reply(
        out,
        NBD_OPT_LIST,
        NBD_REP_SERVER,
        &[&length, name.as_bytes(), description.as_bytes()],
    );
}

/// Appends `NBD_INFO_EXPORT`: length and transmission flags.
pub fn encode_info_export(out: &mut Vec<u8>, option: u32, length: u64, flags: u16) {
    let parts: [&[u8]; 3] = [
        &NBD_INFO_EXPORT.to_be_bytes(),
        &length.to_be_bytes(),
        &flags.to_be_bytes(),
    ];
    encode_reply(out, option, NBD_REP_INFO, &parts);
}

/// Appends `NBD_INFO_BLOCK_SIZE`.
pub fn encode_info_block_size(out: &mut Vec<u8>, option: u32, min: u32, preferred: u32, max: u32) {
    let parts: [&[u8]; 4] = [
        &NBD_INFO_BLOCK_SIZE.to_be_bytes(),
        &min.to_be_bytes(),
        &preferred.to_be_bytes(),
        &max.to_be_bytes(),
    ];
    encode_reply(out, option, NBD_REP_INFO, &parts);
}

/// Appends `NBD_INFO_NAME` or `NBD_INFO_DESCRIPTION`.
pub fn encode_info_text(out: &mut Vec<u8>, option: u32, info: u16, text: &str) {
    encode_reply(
        out,
        option,
        NBD_REP_INFO,
        &[&info.to_be_bytes(), text.as_bytes()],
    );
}

/// Appends `NBD_REP_META_CONTEXT`.
pub fn encode_meta_context(out: &mut Vec<u8>, option: u32, id: u32, name: &str) {
    encode_reply(
        out,
        option,
        NBD_REP_META_CONTEXT,
        &[&id.to_be_bytes(), name.as_bytes()],
    );
}
