// Package bootguard decides at the start of a node which executable runs while an upgrade is on trial, so that a new
// version that does not become healthy is replaced by the one before it without the new version's help.
//
// During a trial the service still starts the executable of before (or, if that one is too old to know this package, the
// new one), whose launcher asks [Choose]. That counts the starts, saves the data that the new version would convert, and
// returns the new executable until the trial has a verdict. "kedge upgrade watch" (package appliance), of the executable of
// before unless that is too old, watches the new version and gives the verdict; if it does not, because the machine loses
// power or the new version never lives long enough, [Choose] gives it after Trial.MaxStarts starts.
//
// The state of a trial is in the folder "upgrade" of the data directory:
//
//	trial.json     what is on trial; the trial lasts as long as the file exists
//	starts.json    how often the new version was started, and what was done for that; written only by Choose
//	verdict.json   the result; written once, and never changed ([Decide])
//	kedge-ID       the new executable
//	saved/         the data of before, complete
//
// Each file has one writer, so that no update is lost, and belongs to a trial by its ID.
//
// The package links no component and knows nothing of the service, the cluster and the health of a node. The launcher and
// package appliance import it.
package bootguard
