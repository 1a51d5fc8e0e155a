// Package errorkind marks errors with what the command has to know about them: which setting is wrong
// ([SettingError]), and whether starting kedge again can help, which is what the exit code says
// ([Permanent], [BadUsage], [ExitCode]).
//
// A package marks an error where the kind is known. Package settings adds to a setting's error the
// place where the setting was made, and main asks for the exit code in the end. The package does not
// say what went wrong, knows no setting and imports nothing of kedge. Any package may import it.
package errorkind
