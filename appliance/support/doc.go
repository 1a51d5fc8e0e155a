// Package support collects what a person needs who helps from afar, into one file: "kedge support-bundle". It has the
// status and the doctor's report, settings, logs, objects of the API, and the state of the kernel.
//
// Secrets stay on the machine. Of settings, objects, mounts and kernel parameters only what is listed in this package is
// copied, so that a field that nobody thought of is left out. Of Secrets and ConfigMaps the API is asked for metadata only.
// Logs cannot be listed in advance: secrets that this machine knows, and texts of the form of a secret, are replaced in them
// and, once more, in all other files. File, bundle and time are bounded.
//
// The package changes nothing but the file that it writes. Package assembly composes its configuration; command imports it
// for the summary.
package support
