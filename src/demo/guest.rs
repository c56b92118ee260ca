//! What the demo does inside its guest.

use std::time::Duration;

use tidemark_engine::Engine;

use crate::failure::{Code, Failure, Result};

/// How long the guest may take to boot; generous, for emulated machines.
const BOOT: Duration = Duration::from_secs(180);

/// A VM's guest.
pub(crate) struct Guest<'a> {
    engine: &'a Engine,
    vm: &'a str,
}

impl<'a> Guest<'a> {
    /// Starts the VM and waits for its guest agent.
    pub(crate) fn boot(engine: &'a Engine, vm: &'a str) -> Result<Self> {
        engine.session(vm)?.start()?;
        engine.wait_agent(vm, BOOT)?;
        Ok(Self { engine, vm })
    }

    /// Runs a shell script and gives what it printed.
    pub(crate) fn sh(&self, script: &str) -> Result<String> {
        let args = ["-c".to_owned(), script.to_owned()];
        let done = self.engine.exec(self.vm, "/bin/sh", &args, None, Duration::from_secs(120))?;
        if done.exit_code != 0 {
            return Err(Failure::new(
                Code::Failed,
                format!(
                    "in the guest: exit code {}: {}",
                    done.exit_code,
                    String::from_utf8_lossy(&done.stderr)
                ),
            ));
        }
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    /// Writes `mib` MiB of incompressible data under `/srv/<name>` and gives its checksum.
    pub(crate) fn write(&self, name: &str, mib: u32) -> Result<String> {
        self.sh(&format!(
            "set -e; mkdir -p /srv; head -c {mib}M /dev/urandom > /srv/{name}; sync; sha256sum /srv/{name}"
        ))
    }

    /// Starts a small writer that appends a numbered line and syncs, for ever.
    pub(crate) fn start_writer(&self) -> Result {
        self.sh("nohup sh -c 'i=0; while :; do i=$((i+1)); echo line $i >> /srv/log; sync /srv/log; sleep 0.1; done' >/dev/null 2>&1 </dev/null & echo started")?;
        Ok(())
    }

    /// Lines of the writer's log; fails if one is missing or garbled.
    pub(crate) fn check_log(&self) -> Result<u64> {
        let text = self.sh(
            "awk '$0 != \"line \" NR {print \"bad line \" NR; exit 1} END {print NR}' /srv/log",
        )?;
        text.parse().map_err(|_| {
            Failure::new(Code::Damaged, format!("the writer's log is not whole: {text}"))
        })
    }
}
