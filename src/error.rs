//! One error type: what it is about, what kind it is (which decides the exit code), and what to do about it.

use std::fmt;

/// What went wrong, coarse enough to decide an exit code and to react to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The command line or a setting asks for something that cannot be done.
    Usage,
    /// A file of the user's is missing, damaged or of an unknown kind.
    Input,
    /// The result could not be written.
    Output,
    /// The device was lost, refused work, or ran out of memory.
    Device,
    /// A computation broke down (a matrix that cannot be factored, a result that is not finite).
    Numeric,
    /// The user stopped the run.
    Interrupted,
    /// A promise inside the program was broken: a bug.
    Internal,
}

/// An error with its subject: the file, tensor, option or kernel that it is about.
#[derive(Debug)]
pub struct Error {
    pub subject: String,
    pub kind: Kind,
    /// What is wrong and what to do about it, one sentence or two.
    pub message: String,
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: Kind, subject: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self { subject: subject.to_string(), kind, message: message.to_string(), source: None }
    }

    pub fn usage(subject: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, subject, message)
    }

    pub fn input(subject: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self::new(Kind::Input, subject, message)
    }

    pub fn output(subject: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self::new(Kind::Output, subject, message)
    }

    pub fn device(subject: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self::new(Kind::Device, subject, message)
    }

    pub fn numeric(subject: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self::new(Kind::Numeric, subject, message)
    }

    pub fn internal(subject: impl fmt::Display, message: impl fmt::Display) -> Self {
        Self::new(Kind::Internal, subject, message)
    }

    /// Keeps the error that caused this one; it is shown after a colon.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// With more to say at its end, after its cause.
    pub fn with_end(mut self, end: &str) -> Self {
        if let Some(source) = self.source.take() {
            self.message += &format!(": {source}");
        }
        self.message += end;
        self
    }

    /// The process exit code: 2 for wrong use and bad input, 130 after Ctrl-C, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Usage | Kind::Input => 2,
            Kind::Interrupted => 130,
            Kind::Output | Kind::Device | Kind::Numeric | Kind::Internal => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.message)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| s.as_ref() as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_its_subject_and_cause() {
        let e = Error::input("model.safetensors", "cannot be read").caused_by(std::io::Error::other("disk on fire"));
        assert_eq!(e.to_string(), "model.safetensors: cannot be read: disk on fire");
        assert_eq!(e.exit_code(), 2);
        assert_eq!(Error::device("gram", "lost").exit_code(), 1);
    }
}
