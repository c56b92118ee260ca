//! Finding restore points on the targets.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tidemark_dedup::{Manifest, RepoError};
use uuid::Uuid;

use crate::error::{ExportError, Result};
use crate::exporter::Exporter;
use crate::model::{FACTS_VERSION, FoundPoint, PointFacts};

/// Shortest prefix of an id that is looked up.
const MIN_PREFIX: usize = 4;

/// Targets that could not be read, or single restore points on them.
pub type Unread = Vec<(String, ExportError)>;

/// What a user may write for a restore point.
enum Selector {
    Id(Uuid),
    /// Lower-case hexadecimal digits.
    Prefix(String),
    /// Of this VM, by name or id.
    Latest(String),
}

impl Selector {
    fn parse(text: &str) -> Result<Self> {
        if let Some(vm) = text.strip_prefix("latest:") {
            return Ok(Self::Latest(vm.to_owned()));
        }
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        if digits.len() < MIN_PREFIX || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(ExportError::Invalid(format!(
                "{text:?} is not a restore point: give its id, at least {MIN_PREFIX} characters of it, or latest:<vm>"
            )));
        }
        Ok(Self::Prefix(digits.to_ascii_lowercase()))
    }
}

impl Exporter<'_> {
    /// All restore points of all targets, oldest first, and targets that could not be read. `vm` is a
    /// VM's name or id.
    pub fn list(&self, vm: Option<&str>) -> Result<(Vec<FoundPoint>, Unread)> {
        let (mut points, unread) = self.collect(&self.names_to_read(None)?);
        if let Some(vm) = vm {
            points.retain(|p| belongs_to(p, vm));
        }
        Ok((points, unread))
    }

    /// Finds one by id, unique prefix, or `latest:<vm>`.
    pub fn find(&self, point: &str, target: Option<&str>) -> Result<FoundPoint> {
        self.locate(point, target).map(|(found, _)| found)
    }

    /// Like [`Exporter::find`]; also tells which targets could not be asked.
    pub(crate) fn locate(&self, point: &str, target: Option<&str>) -> Result<(FoundPoint, Unread)> {
        let selector = Selector::parse(point)?;
        let names = self.names_to_read(target)?;
        let (mut points, mut unread) = match &selector {
            Selector::Id(id) => self.collect_one(&names, *id),
            _ => self.collect(&names),
        };
        match &selector {
            Selector::Id(_) => {}
            Selector::Prefix(prefix) => {
                points.retain(|p| p.manifest.point.simple().to_string().starts_with(prefix));
            }
            Selector::Latest(vm) => {
                points.retain(|p| belongs_to(p, vm));
                points = points.pop().into_iter().collect();
            }
        }
        if points.len() > 1 {
            let ids: Vec<_> = points.iter().map(|p| p.manifest.point.to_string()).collect();
            return Err(ExportError::Ambiguous {
                prefix: point.to_owned(),
                points: ids.join(", "),
            });
        }
        match points.pop() {
            Some(found) => Ok((found, unread)),
            None if unread.is_empty() => Err(ExportError::NoSuchPoint(point.to_owned())),
            // Asked for one target: its own error says most.
            None if names.len() == 1 && unread.len() == 1 => Err(unread.remove(0).1),
            None => {
                let unread: Vec<_> = unread.iter().map(|(_, e)| e.to_string()).collect();
                Err(ExportError::PointNotFound {
                    point: point.to_owned(),
                    unread: unread.join("; "),
                })
            }
        }
    }

    /// Targets in the order in which they are best read: local ones first, then by name.
    fn names_to_read(&self, target: Option<&str>) -> Result<Vec<String>> {
        if let Some(name) = target {
            return Ok(vec![self.files.get(name)?.target.name]);
        }
        let mut targets = self.targets()?;
        targets.sort_by_key(|target| !target.is_local());
        Ok(targets.into_iter().map(|target| target.name).collect())
    }

    /// The restore points of these targets, merged by id, oldest first.
    fn collect(&self, names: &[String]) -> (Vec<FoundPoint>, Unread) {
        let mut found = Merged::default();
        for name in names {
            let listed = self
                .repository(name)
                .and_then(|repository| repository.points(None).map_err(ExportError::on(name)));
            match listed {
                Ok(manifests) => {
                    for manifest in manifests {
                        found.add(name, manifest.map_err(ExportError::on(name)));
                    }
                }
                Err(e) => found.unread.push((name.clone(), e)),
            }
        }
        found.finish()
    }

    fn collect_one(&self, names: &[String], id: Uuid) -> (Vec<FoundPoint>, Unread) {
        let mut found = Merged::default();
        for name in names {
            match self.repository(name).map(|repository| repository.point(id)) {
                Ok(Err(RepoError::NoSuchPoint(_))) => {}
                Ok(manifest) => found.add(name, manifest.map_err(ExportError::on(name))),
                Err(e) => found.unread.push((name.clone(), e)),
            }
        }
        found.finish()
    }
}

/// Restore points of several targets, merged by id.
#[derive(Default)]
struct Merged {
    points: BTreeMap<Uuid, FoundPoint>,
    unread: Unread,
}

impl Merged {
    fn add(&mut self, target: &str, manifest: Result<Manifest>) {
        let parsed = manifest.and_then(|m| parse_facts(target, &m).map(|facts| (m, facts)));
        match parsed {
            Ok((manifest, facts)) => {
                let targets = Vec::new();
                let point = self.points.entry(manifest.point);
                let point = point.or_insert(FoundPoint { manifest, facts, targets });
                point.targets.push(target.to_owned());
            }
            Err(e) => self.unread.push((target.to_owned(), e)),
        }
    }

    fn finish(self) -> (Vec<FoundPoint>, Unread) {
        let mut points: Vec<_> = self.points.into_values().collect();
        // By time, not by text: RFC 3339 texts of different precision do not sort.
        points.sort_by_key(|p| (p.manifest.created.parse::<Timestamp>().ok(), p.manifest.point));
        (points, self.unread)
    }
}

fn belongs_to(point: &FoundPoint, vm: &str) -> bool {
    point.facts.vm.name == vm || vm.parse::<Uuid>().is_ok_and(|id| id == point.manifest.group)
}

/// The facts of a restore point; a newer version is told apart from damage.
pub(crate) fn parse_facts(target: &str, manifest: &Manifest) -> Result<PointFacts> {
    let error = |what: String| ExportError::Facts {
        point: manifest.point.to_string(),
        target: target.to_owned(),
        what,
    };
    let version = manifest.facts.get("version").and_then(serde_json::Value::as_u64);
    match version {
        Some(v) if v == u64::from(FACTS_VERSION) => {}
        Some(v) if v > u64::from(FACTS_VERSION) => {
            return Err(error(format!(
                "their version is {v}, newer than this program; upgrade it"
            )));
        }
        _ => return Err(error("they have no version".to_owned())),
    }
    serde::Deserialize::deserialize(&manifest.facts)
        .map_err(|e: serde_json::Error| error(e.to_string()))
}

/// How a boot file is named among a restore point's files.
const BOOT: &str = "boot/";

pub(crate) fn boot_file_name(name: &str) -> String {
    format!("{BOOT}{name}")
}

/// The boot file's name, if this is one.
pub(crate) fn is_boot_file(name: &str) -> Option<&str> {
    name.strip_prefix(BOOT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_ids_prefixes_or_latest() {
        let id = Uuid::new_v4();
        assert!(matches!(Selector::parse(&id.to_string()), Ok(Selector::Id(i)) if i == id));
        assert!(matches!(Selector::parse("latest:web"), Ok(Selector::Latest(vm)) if vm == "web"));
        assert!(matches!(Selector::parse("AB12-c"), Ok(Selector::Prefix(p)) if p == "ab12c"));
        for bad in ["", "abc", "web", "----", "12345g"] {
            assert!(Selector::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn facts_of_a_newer_version_say_so() {
        let manifest = |facts| Manifest {
            point: Uuid::new_v4(),
            group: Uuid::new_v4(),
            created: String::new(),
            disks: Vec::new(),
            files: Vec::new(),
            stats: Default::default(),
            facts,
        };
        let error = |facts| parse_facts("t", &manifest(facts)).unwrap_err().to_string();
        assert!(error(serde_json::json!({"version": 2})).contains("newer"));
        assert!(error(serde_json::json!({"x": 2})).contains("no version"));
        assert!(error(serde_json::json!({"version": 1})).contains("missing field"));
    }
}
