package release

import (
	"errors"
	"fmt"
)

// ErrNoKey is returned by [Verify] when there is no key with which a signature could be checked.
var ErrNoKey = errors.New("no key of releases is known: this kedge was built without one; put a key that you trust into " + TrustedKeysFile)

// ErrSignature is wrapped by [*SignatureError].
var ErrSignature = errors.New("the signature of the release does not match")

// SignatureError is a signature that is damaged, of an unknown key, or of another list.
type SignatureError struct{ Reason string }

func (e *SignatureError) Error() string {
	return fmt.Sprintf("the release is not to be trusted: %s; fetch it again, and do not use it if the error stays", e.Reason)
}

// Unwrap makes the error an [ErrSignature].
func (e *SignatureError) Unwrap() error { return ErrSignature }

// HashError is a file with another content than the release has. The hashes are in hexadecimal.
type HashError struct{ Name, Want, Got string }

func (e *HashError) Error() string {
	return fmt.Sprintf("%s is damaged: its SHA-256 is %s, and the release has %s; fetch it again", e.Name, e.Got, e.Want)
}

// NotListedError is a file that the release does not have.
type NotListedError struct{ Name string }

func (e *NotListedError) Error() string { return fmt.Sprintf("the release has no file %s", e.Name) }

// MissingError is a folder without a file that is needed to verify it.
type MissingError struct{ Folder, Name string }

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s has no file %s: it is not the folder of a release, or the release is not signed", e.Folder, e.Name)
}

// VersionError is a list of another version than the expected one.
type VersionError struct{ Version string }

func (e *VersionError) Error() string {
	return fmt.Sprintf("the list of files is not that of version %s", e.Version)
}

// FormatError is a list, a signature or a file of keys that cannot be read.
type FormatError struct{ Name, Reason string }

func (e *FormatError) Error() string { return fmt.Sprintf("%s cannot be used: %s", e.Name, e.Reason) }
