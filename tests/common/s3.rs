//! The S3 service of a test host.

use std::path::Path;
use std::process::Command;

use tidemark_lab::{ACCESS_KEY, S3Service, SECRET_KEY};

use super::Host;

/// Starts one with its data in the host's folder.
pub(crate) fn start(host: &Host) -> S3Service {
    let weed = tidemark_lab::weed(Path::new(env!("CARGO_MANIFEST_DIR")));
    S3Service::start(&weed, host.path()).unwrap()
}

/// Gives a command the service's keys.
pub(crate) fn with_keys(command: &mut Command) -> &mut Command {
    command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
}

/// Writes the keys to a file for `--credentials-file`.
pub(crate) fn key_file(host: &Host) -> String {
    let path = host.path().join("s3-keys");
    std::fs::write(&path, format!("access_key_id={ACCESS_KEY}\nsecret_access_key={SECRET_KEY}\n"))
        .unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    path.to_str().unwrap().to_owned()
}
