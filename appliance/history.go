package appliance

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"kedge/internal/atomicfile"
	"kedge/internal/control"
	"kedge/launcher/bootguard"
)

// Result is how an upgrade has ended.
type Result string

// The results of upgrades.
const (
	Upgraded Result = "upgraded"
	WentBack Result = "went back"
)

// Outcome is an upgrade that has ended.
type Outcome struct {
	ID     string    `json:"id"`
	Begin  time.Time `json:"begin"`
	End    time.Time `json:"end"`
	From   Build     `json:"from"`
	To     Build     `json:"to"`
	Result Result    `json:"result"`
	Reason string    `json:"reason,omitempty"` // for going back
	// Snapshot is the datastore as it was before, nil if none was saved. The file of an earlier upgrade is gone.
	Snapshot *control.SavedSnapshot `json:"snapshot,omitempty"`
}

// UpgradeStatus is what is known of the upgrades of a node.
type UpgradeStatus struct {
	Trial   *TrialStatus `json:"trial,omitempty"`   // that lasts
	History []Outcome    `json:"history,omitempty"` // oldest first
}

// TrialStatus is an upgrade without an end.
type TrialStatus struct {
	ID        string    `json:"id"`
	Begin     time.Time `json:"begin"`
	From      Build     `json:"from"`
	To        Build     `json:"to"`
	Starts    int       `json:"starts"` // of the new version
	MaxStarts int       `json:"maxStarts"`
	Verdict   string    `json:"verdict"` // empty, upgraded or went back; the second two while they are carried out
	Reason    string    `json:"reason,omitempty"`
}

// maxOutcomes is how many upgrades are remembered.
const maxOutcomes = 50

const historyName = "history.json"

func (m Machine) readHistory(dataDir string) (list []Outcome, err error) {
	path := m.path(bootguard.Path(dataDir, historyName))
	data, err := atomicfile.ReadSmall(path, maxConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		if err = json.Unmarshal(data, &list); err != nil {
			err = fmt.Errorf("read %s: %w; remove it to forget the earlier upgrades", path, err)
		}
	}
	return list, err
}

// addOutcome records an upgrade. One that is recorded already, because its end was interrupted, stays.
func (m Machine) addOutcome(dataDir string, o Outcome) error {
	list, err := m.readHistory(dataDir)
	if err != nil {
		list = nil // a damaged history must not keep a trial from its end
	}
	if slices.ContainsFunc(list, func(other Outcome) bool { return other.ID == o.ID }) {
		return nil
	}
	list = append(list, o)
	data, err := json.MarshalIndent(list[max(0, len(list)-maxOutcomes):], "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(m.path(bootguard.Path(dataDir, historyName)), append(data, '\n'), 0o600)
}

// Upgrades returns what is known of the upgrades of a node.
func (m Machine) Upgrades(dataDir string) (s UpgradeStatus, err error) {
	if s.History, err = m.readHistory(dataDir); err != nil {
		return s, err
	}
	t, d, err := m.readTrial(dataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	starts, err := bootguard.ReadStarts(m.path(dataDir), t)
	if err != nil {
		return s, err
	}
	s.Trial = &TrialStatus{ID: t.ID, Begin: d.Begin, From: d.From, To: d.To, Starts: starts.Count, MaxStarts: t.MaxStarts}
	v, found, err := bootguard.ReadVerdict(m.path(dataDir), t)
	switch {
	case !found:
	case v.Proven:
		s.Trial.Verdict = string(Upgraded)
	default:
		s.Trial.Verdict, s.Trial.Reason = string(WentBack), v.Reason
	}
	return s, err
}

// LastUpgrade returns the upgrade that has ended last.
func (m Machine) LastUpgrade(dataDir string) (o Outcome, found bool) {
	list, err := m.readHistory(dataDir)
	if err != nil || len(list) == 0 {
		return o, false
	}
	return list[len(list)-1], true
}

// EndTrial ends the trial that lasts in favour of the version of before. "kedge upgrade watch" carries that out.
func (m Machine) EndTrial(dataDir, reason string) error {
	t, err := bootguard.ReadTrial(m.path(dataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNoUpgrade
	}
	if err != nil {
		return err
	}
	v, err := bootguard.Decide(m.path(dataDir), t, false, reason)
	if err == nil && v.Proven {
		err = errors.New("the new version was proven healthy just now; run \"kedge upgrade rollback\" again to go back to the version of before")
	}
	return err
}
