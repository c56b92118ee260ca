//! Adding, testing and mistaking targets.

use crate::common::*;
use tidemark_exporter::ExportError;

#[test]
fn a_target_is_found_again_on_another_host_with_all_its_points() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first"]);
    lab.create_vm("web", &[MIB]);
    let report = backup(&exporter, "web", &[]);
    let checks = exporter.test_target("first").unwrap();
    assert!(checks.iter().any(|c| c.contains("conditional create")), "{checks:?}");
    assert!(checks.iter().any(|c| c.contains("1 restore points")), "{checks:?}");

    let other = Lab::new();
    let mut target = lab.target("first");
    target.name = "elsewhere".to_owned();
    let exporter = other.exporter();
    assert_eq!(exporter.add_target(&target).unwrap(), (false, 1));
    assert_eq!(exporter.find("latest:web", None).unwrap().manifest.point, report.point);
    let (restored, _) = restore(&exporter, "latest:web", "web", None);
    restored.unwrap();
}

#[test]
fn the_same_repository_does_not_count_twice() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first"]);
    let mut twin = lab.target("first");
    twin.name = "twin".to_owned();
    let error = exporter.add_target(&twin).unwrap_err().to_string();
    assert!(error.contains("first"), "{error}");
    assert_eq!(exporter.targets().unwrap().len(), 1);
    assert!(matches!(exporter.add_target(&lab.target("first")), Err(ExportError::TargetExists(_))));
}

#[test]
fn an_exchanged_or_unmounted_store_is_noticed_and_not_written_to() {
    let lab = Lab::new();
    lab.with_targets(&["first", "second"]);
    std::fs::remove_dir_all(lab.store("first")).unwrap();
    std::fs::create_dir(lab.store("first")).unwrap();
    let exporter = lab.exporter();
    let error = exporter.repository("first").err().unwrap().to_string();
    assert!(error.contains("no repository"), "{error}");
    assert_eq!(std::fs::read_dir(lab.store("first")).unwrap().count(), 0);

    std::fs::remove_dir(lab.store("first")).unwrap();
    std::fs::rename(lab.store("second"), lab.store("first")).unwrap();
    let error = exporter.repository("first").err().unwrap().to_string();
    assert!(error.contains("right store"), "{error}");
}

#[test]
fn a_wrong_passphrase_adds_nothing_and_shows_no_secret() {
    let lab = Lab::new();
    lab.with_targets(&["first"]);
    lab.secret("passphrase", "hunter2hunter2\n");
    let mut target = lab.target("first");
    target.name = "again".to_owned();
    let exporter = lab.exporter();
    let error = exporter.add_target(&target).unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(text.contains("wrong passphrase") && !text.contains("hunter2"), "{text}");
    assert_eq!(exporter.targets().unwrap().len(), 1);
    exporter.remove_target("first").unwrap();
    assert!(matches!(exporter.repository("first"), Err(ExportError::NoSuchTarget(_))));
    assert!(!files_over(&lab.store("first"), 0).is_empty(), "the repository is untouched");
}

#[test]
fn a_secret_file_that_others_can_read_is_told() {
    use std::os::unix::fs::PermissionsExt as _;
    let lab = Lab::new();
    let path = lab.secret("passphrase", "x y z\n");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let exporter = lab.with_targets(&["first"]);
    let notes = exporter.take_notes();
    assert!(notes[0].contains("chmod 600"), "{notes:?}");
    assert!(exporter.take_notes().is_empty());
}
