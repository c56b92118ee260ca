//! The parent locator item ([MS-VHDX] 2.6.2.6): keys and values in UTF-16LE.

use std::collections::HashMap;

use uuid::{Uuid, uuid};

use super::ParentLocator;
use super::layout::{guid_at, put, u16_at, u32_at};

const TYPE: Uuid = uuid!("B04AEFB7-D19E-4A81-B789-25B8E9445913");

/// Parses a locator. At least one path must be there; nothing here is ever opened as it stands.
pub(crate) fn parse(item: &[u8]) -> Result<ParentLocator, String> {
    if item.len() < 20 || guid_at(item, 0) != TYPE {
        return Err("parent locator of an unknown type".to_owned());
    }
    let count = usize::from(u16_at(item, 18));
    let table = item.get(20..20 + 12 * count).ok_or("parent locator is cut off")?;
    let mut pairs = HashMap::new();
    for e in table.chunks_exact(12) {
        let key = text(item, u32_at(e, 0), u16_at(e, 8))?;
        let value = text(item, u32_at(e, 4), u16_at(e, 10))?;
        if pairs.insert(key.clone(), value).is_some() {
            return Err(format!("parent locator names {key} twice"));
        }
    }
    let linkage = pairs.get("parent_linkage").ok_or("parent locator without parent_linkage")?;
    let linkage2 = pairs.get("parent_linkage2").map(|g| guid(g)).transpose()?;
    let locator = ParentLocator {
        linkage: guid(linkage)?,
        linkage2,
        relative_path: pairs.remove("relative_path"),
        volume_path: pairs.remove("volume_path"),
        absolute_path: pairs.remove("absolute_win32_path"),
    };
    if locator.relative_path.is_none()
        && locator.volume_path.is_none()
        && locator.absolute_path.is_none()
    {
        return Err("parent locator without a path".to_owned());
    }
    Ok(locator)
}

fn text(item: &[u8], offset: u32, len: u16) -> Result<String, String> {
    let (offset, len) = (offset as usize, usize::from(len));
    let bytes = item.get(offset..offset + len).ok_or("parent locator points outside itself")?;
    if offset < 20 || len == 0 || len % 2 != 0 {
        return Err("parent locator with an empty or odd string".to_owned());
    }
    let units: Vec<u16> = bytes.chunks_exact(2).map(|c| u16_at(c, 0)).collect();
    String::from_utf16(&units)
        .ok()
        .filter(|s| !s.contains('\0'))
        .ok_or_else(|| "parent locator with text that is not UTF-16".to_owned())
}

fn guid(text: &str) -> Result<Uuid, String> {
    let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
    inner.parse().map_err(|_| format!("parent locator with the GUID {text}"))
}

/// Encodes a locator; GUIDs in lower case and braces, as all readers take them.
pub(crate) fn encode(locator: &ParentLocator) -> Result<Vec<u8>, String> {
    let mut pairs = vec![("parent_linkage", locator.linkage.braced().to_string())];
    pairs.extend(locator.linkage2.map(|g| ("parent_linkage2", g.braced().to_string())));
    pairs.extend(locator.relative_path.clone().map(|p| ("relative_path", p)));
    pairs.extend(locator.volume_path.clone().map(|p| ("volume_path", p)));
    pairs.extend(locator.absolute_path.clone().map(|p| ("absolute_win32_path", p)));
    let mut b = vec![0; 20 + 12 * pairs.len()];
    put(&mut b, 0, &TYPE.to_bytes_le());
    put(&mut b, 18, &(pairs.len() as u16).to_le_bytes());
    for (i, (key, value)) in pairs.iter().enumerate() {
        for (field, text) in [(0, *key), (1, value.as_str())] {
            let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let len = u16::try_from(units.len())
                .map_err(|_| format!("{key} of the parent is too long"))?;
            let at = 20 + 12 * i;
            let offset = b.len() as u32;
            put(&mut b, at + 4 * field, &offset.to_le_bytes());
            put(&mut b, at + 8 + 2 * field, &len.to_le_bytes());
            b.extend(units);
        }
    }
    Ok(b)
}
