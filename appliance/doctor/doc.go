// Package doctor finds what is wrong with a kedge machine, and names the command that mends it: "kedge doctor". It works
// while kedge runs, when kedge does not start, and on a machine without a node.
//
// A check has two halves. Its reader collects facts of the host within a time limit; its judge is a pure function of these
// facts that returns findings, so that tests feed facts. All checks run side by side. A check whose facts cannot be read
// gives a finding of level "unknown" with the reason. What a machine must be able to do before kedge starts is checked by
// package preflight, whose results are a part of the report.
//
// The package repairs only kernel parameters, on request, and restarts nothing. Package assembly composes its
// configuration; command and appliance/support import it for the report.
package doctor
