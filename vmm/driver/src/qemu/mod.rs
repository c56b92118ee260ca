//! QEMU as the virtual machine monitor.

mod args;
mod process;
mod qmp;

use std::fs::{DirBuilder, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qapi::qmp::{cont, query_kvm, query_status, query_version, stop, system_powerdown};

use self::process::Process;
use crate::agent::AGENT_SOCKET;
use crate::{DriverError, Machine, MachineSpec, MachineState, Result, probe};

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";

/// QMP socket in the run directory.
const MONITOR_SOCKET: &str = "qmp.sock";

/// Process id file that QEMU writes itself.
const PID_FILE: &str = "qemu.pid";

/// What QEMU says on standard error.
const LOG_FILE: &str = "qemu.log";

/// How long QEMU may take from its start to its first QMP answer; it waits for the disk owner in
/// that time.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a killed process may take to vanish (its memory is freed in that time).
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a process may take to end after its monitor has closed.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// At most this much of the log goes into an error.
const LOG_TAIL: u64 = 4096;

/// A running `qemu-system-x86_64`.
#[derive(Debug)]
pub struct Qemu {
    monitor: PathBuf,
    process: Process,
    description: String,
}

impl Qemu {
    /// Starts QEMU in its own session and waits until it answers QMP.
    pub fn launch(spec: &MachineSpec) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&spec.run_dir)
            .map_err(DriverError::io("create", &spec.run_dir))?;
        let Some(lock) = process::lock_to_launch(&spec.run_dir)? else {
            return Err(DriverError::LaunchFailed(format!(
                "one runs already with {}; stop it first",
                spec.run_dir.display()
            )));
        };
        process::forget(&spec.run_dir);
        for name in [MONITOR_SOCKET, AGENT_SOCKET] {
            let _ = std::fs::remove_file(spec.run_dir.join(name));
        }
        let mut log = Log::open(&spec.run_dir)?;
        let mut child = spawn(spec, lock, &log)?;
        let ready = Process::of_child(child.id()).and_then(|process| {
            process.record(&spec.run_dir)?;
            wait_ready(&spec.run_dir, &mut child, &mut log)?;
            Ok(process)
        });
        let attached = ready.and_then(|process| {
            let description = Self::describe(&spec.run_dir.join(MONITOR_SOCKET))?;
            Ok(Self::of(&spec.run_dir, process, description))
        });
        if attached.is_err() {
            // Nothing half-launched stays behind. Its end is certain before the error is told.
            let _ = child.kill();
            let _ = child.wait();
        }
        attached
    }

    /// Finds the machine that was launched with this run directory.
    pub fn attach(run_dir: &Path) -> Result<Option<Self>> {
        let Some(process) = process::find(run_dir)? else { return Ok(None) };
        let asked = Self::describe(&run_dir.join(MONITOR_SOCKET));
        match asked {
            // The monitor closes its socket just before the process ends.
            Err(DriverError::NotRunning) if process.wait(END_TIMEOUT)? => Ok(None),
            asked => Ok(Some(Self::of(run_dir, process, asked?))),
        }
    }

    /// Its process id, from the run directory alone.
    pub fn process_id(run_dir: &Path) -> Result<Option<u32>> {
        Ok(process::find(run_dir)?.map(|process| process.pid()))
    }

    fn of(run_dir: &Path, process: Process, description: String) -> Self {
        Self { monitor: run_dir.join(MONITOR_SOCKET), process, description }
    }

    /// What runs there, as its monitor says.
    fn describe(monitor: &Path) -> Result<String> {
        let version = qmp::execute(monitor, query_version {}, qmp::TIMEOUT)?.qemu;
        let kvm = qmp::execute(monitor, query_kvm {}, qmp::TIMEOUT)?.enabled;
        Ok(format!(
            "qemu {}.{}.{} ({})",
            version.major,
            version.minor,
            version.micro,
            if kvm { "kvm" } else { "tcg" }
        ))
    }

    fn qmp<C: qapi::qmp::QmpCommand>(&self, command: C) -> Result<C::Ok> {
        qmp::execute(&self.monitor, command, qmp::TIMEOUT)
    }
}

impl Machine for Qemu {
    fn state(&mut self) -> Result<MachineState> {
        if self.process.wait(Duration::ZERO)? {
            return Ok(MachineState::Stopped);
        }
        match self.qmp(query_status {}) {
            Ok(status) if status.running => Ok(MachineState::Running),
            Ok(_) => Ok(MachineState::Paused),
            Err(_) if self.process.wait(Duration::ZERO)? => Ok(MachineState::Stopped),
            // The monitor closes its socket just before the process ends.
            Err(DriverError::NotRunning) if self.process.wait(END_TIMEOUT)? => {
                Ok(MachineState::Stopped)
            }
            Err(error) => Err(error),
        }
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn press_power_button(&mut self) -> Result<()> {
        self.qmp(system_powerdown {}).map(drop)
    }

    fn wait_stopped(&mut self, timeout: Duration) -> Result<bool> {
        self.process.wait(timeout)
    }

    fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        if self.process.wait(KILL_TIMEOUT)? {
            return Ok(());
        }
        Err(DriverError::Io {
            op: "kill",
            what: format!("process {}", self.process.pid()),
            source: std::io::ErrorKind::TimedOut.into(),
        })
    }

    fn pause(&mut self) -> Result<()> {
        self.qmp(stop {}).map(drop)
    }

    fn resume(&mut self) -> Result<()> {
        self.qmp(cont {}).map(drop)
    }

    fn description(&self) -> String {
        self.description.clone()
    }
}

/// Starts the process: its own session, so that neither a terminal's end nor Ctrl-C reaches it.
fn spawn(spec: &MachineSpec, lock: File, log: &Log) -> Result<Child> {
    let mut command = Command::new(PROGRAM);
    command
        .args(args::build(spec, probe::accelerator())?)
        .current_dir(&spec.run_dir)
        .stdin(Stdio::from(lock))
        .stdout(log.writer()?)
        .stderr(log.writer()?);
    // SAFETY: setsid is a plain system call, which may be made between fork and exec; it allocates
    // nothing and takes no lock. It cannot fail here: a fresh child leads no process group.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    command.spawn().map_err(|source| DriverError::Io {
        op: "start",
        what: format!("{PROGRAM} (Debian package qemu-system-x86)"),
        source,
    })
}

/// Waits for the first answer on QMP.
fn wait_ready(run_dir: &Path, child: &mut Child, log: &mut Log) -> Result<()> {
    let monitor = run_dir.join(MONITOR_SOCKET);
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let answer = qmp::execute(&monitor, query_status {}, Duration::from_secs(2));
        if answer.is_ok() {
            return Ok(());
        }
        let ended = child.try_wait().map_err(DriverError::io("wait for", Path::new(PROGRAM)))?;
        if let Some(status) = ended {
            return Err(DriverError::LaunchFailed(format!("{status}: {}", log.tail())));
        }
        if Instant::now() >= deadline {
            return Err(DriverError::LaunchFailed(format!(
                "no answer on QMP within {} s: {}",
                START_TIMEOUT.as_secs(),
                log.tail()
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// QEMU's standard error, appended over all launches.
struct Log {
    path: PathBuf,
    file: File,
    /// Where this launch begins.
    start: u64,
}

impl Log {
    fn open(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join(LOG_FILE);
        let opened = File::options().append(true).read(true).create(true).open(&path);
        let mut file = opened.map_err(DriverError::io("open", &path))?;
        let start = file.seek(SeekFrom::End(0)).map_err(DriverError::io("read", &path))?;
        Ok(Self { path, file, start })
    }

    fn writer(&self) -> Result<Stdio> {
        Ok(self.file.try_clone().map_err(DriverError::io("open", &self.path))?.into())
    }

    /// What this launch said, its end if it is long.
    fn tail(&mut self) -> String {
        let mut text = Vec::new();
        let end = self.file.seek(SeekFrom::End(0)).unwrap_or(self.start);
        let from = self.start.max(end.saturating_sub(LOG_TAIL));
        // The log is an aid: when it cannot be read the error is told without it.
        let _ = self.file.seek(SeekFrom::Start(from));
        let _ = (&self.file).take(LOG_TAIL).read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        let text = text.trim();
        if text.is_empty() {
            format!("it said nothing in {}", self.path.display())
        } else {
            text.to_owned()
        }
    }
}
