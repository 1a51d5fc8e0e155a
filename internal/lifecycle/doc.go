// Package lifecycle starts, watches and stops the long-running parts of kedge.
//
// A part is a [Component]: a name and a blocking Run. A [Group] owns the protocol around it, so
// that no component can get it wrong: components start in parallel as soon as their
// dependencies are ready, and stop in reverse dependency order with a time limit for each
// component and one for all of them together.
//
// There are two kinds of components. The failure of an essential one ([Group.Add])
// stops the group, and with it the process:
//
//	           deps ready          ready()            dependents gone
//	Waiting ────────────▶ Starting ───────▶ Ready ─────────────────▶ Stopping
//	   │                     │                │                          │
//	   │ group stops         │ Run returns    │ Run returns              │ Run returns
//	   ▼                     ▼                ▼                          ▼
//	Stopped                Failed           Failed                    Stopped
//
// The failure of a restarted component ([Group.AddRestarted]) stops nothing else. Its Run is
// called again after a pause, and the others go on without it meanwhile:
//
//	                     ready()
//	Waiting ──▶ Starting ───────▶ Ready ──▶ Stopping ──▶ Stopped
//	               ▲ │              │
//	         pause │ │ Run returns  │ Run returns       (an error that is [Final]
//	          over │ ▼              ▼                    leads to Failed, for good)
//	               └──── Restarting ◀┘
//
// The contract of a restarted component:
//
//   - Run may be called again, on the same value, after it has returned or panicked. Its
//     context has ended by then, and nothing that it started may live on.
//   - Its dependents are neither stopped nor started again. Dependents that have not been
//     started wait until it is ready for the first time; running dependents must tolerate
//     its absence, or fail and be restarted themselves.
//   - The pause begins with a second and doubles up to a minute. It begins with a second
//     again after the component has been ready for ten minutes.
//   - A component that cannot be started twice in a process returns a [Final] error. With
//     [WithFinalFailuresEnd] that ends the group too: for a process that is useless without
//     the component.
//   - A panic on the goroutine of Run is a failure like others. A panic on another goroutine
//     can be caught only by that goroutine's own code, and otherwise ends the process.
//
// [Wakeup] and [Backoff] are for the loops inside components: how one goroutine wakes another, and how long a loop waits after
// failed attempts. (Package wait of k8s.io/apimachinery has a Backoff too: it has a number of steps, and does not start again
// after a success.)
//
// The package is not for one-shot work (certificates, unpacking), which is done by plain
// functions before Group.Run. It knows nothing of the components' work and imports nothing of
// kedge.
//
// Any package of kedge may import it. Only package main builds a Group; other packages only
// have the two methods.
package lifecycle
