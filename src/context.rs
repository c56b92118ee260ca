//! What every command needs: the data directory, how to speak, and how Ctrl-C is heard.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tidemark_engine::{Engine, EngineOptions};
use tidemark_exporter::Exporter;

use crate::failure::{Code, Failure, Result};
use crate::output::Output;

/// A command's surroundings.
pub(crate) struct Context {
    data_dir: PathBuf,
    /// How to speak.
    pub(crate) output: Output,
    /// Set by Ctrl-C and SIGTERM: stop, clean up, end.
    pub(crate) cancel: Arc<AtomicBool>,
}

impl Context {
    /// Sets up signal handling. A second Ctrl-C ends the process at once; the next operation on the
    /// VM then finishes or undoes what was half done.
    pub(crate) fn new(data_dir: PathBuf, json: bool, quiet: bool) -> Result<Self> {
        let cancel = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancel);
        ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::SeqCst) {
                std::process::exit(Code::Cancelled as i32);
            }
            eprintln!("\ntidemark: cancelling and cleaning up; press Ctrl-C again to end at once");
        })
        .map_err(|e| Failure::new(Code::Failed, format!("cannot listen for Ctrl-C: {e}")))?;
        Ok(Self { data_dir, output: Output::new(json, quiet), cancel })
    }

    /// The engine over the data directory.
    pub(crate) fn engine(&self) -> Result<Engine> {
        self.engine_at(&self.data_dir)
    }

    /// An engine over another directory.
    pub(crate) fn engine_at(&self, data_dir: &Path) -> Result<Engine> {
        Ok(Engine::open(data_dir, EngineOptions { program: program()? })?)
    }

    /// The exporter over an engine, asking for secrets at the terminal where there is one.
    pub(crate) fn exporter<'a>(&self, engine: &'a Engine) -> Exporter<'a> {
        Exporter::new(engine, &prompt)
    }
}

/// This program, to be run as disk owner and guard. The path stays valid when the file is replaced
/// by an upgrade.
pub(crate) fn program() -> Result<PathBuf> {
    std::env::current_exe().map_err(|e| {
        Failure::new(Code::Failed, format!("cannot find the tidemark program itself: {e}"))
    })
}

fn prompt(what: &str) -> Option<String> {
    if !std::io::stdin().is_terminal() {
        return None;
    }
    let mut err = std::io::stderr();
    let _ = write!(err, "{what}: ");
    let _ = err.flush();
    rpassword::read_password().ok().filter(|s| !s.is_empty())
}
