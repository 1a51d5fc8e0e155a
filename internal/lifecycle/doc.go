// Package lifecycle starts, watches and stops the long-running parts of kedge.
//
// A part is a [Component]: a name and one blocking Run. A [Group] owns the
// protocol around it, so that no component can get it wrong: components start
// in parallel as soon as everything they come after is ready, the first failure
// stops the group, and stopping goes in reverse dependency order with a time
// limit for each component and one for all of them together.
//
//	           deps ready          ready()            dependents gone
//	Waiting ────────────▶ Starting ───────▶ Ready ─────────────────▶ Stopping
//	   │                     │                │                          │
//	   │ group stops         │ Run returns    │ Run returns              │ Run returns
//	   ▼                     ▼                ▼                          ▼
//	Stopped                Failed           Failed                    Stopped
//
// It is not for one-shot work (certificates, unpacking): that is a plain
// function called before Group.Run. It knows nothing about what a component
// does and imports nothing of kedge.
//
// Any package of kedge may import it; in practice only package main builds a
// Group, the others just have the two methods.
package lifecycle
