package command

import (
	"encoding/json"
	"testing"

	"kedge/appliance/doctor"
	"kedge/settings"
)

// TestDoctor: the exit code says whether something is wrong, and the settings of the node are passed on.
func TestDoctor(t *testing.T) {
	root(t)
	finding := func(l doctor.Level) doctor.Finding {
		return doctor.Finding{Level: l, Check: "c", Subject: "s", What: "w", Remedy: "r"}
	}
	for _, test := range []struct {
		levels []doctor.Level
		code   int
		out    string
	}{
		{nil, 0, "no problems found by 9 checks; kedge runs as process 7, node n\n"},
		{[]doctor.Level{doctor.Warning}, 0, "WARNING  s: w; r\n1 warning by 9 checks; kedge runs as process 7, node n\n"},
		{[]doctor.Level{doctor.Fixed}, 0, "FIXED    s: w\n1 fixed by 9 checks; kedge runs as process 7, node n\n"},
		{[]doctor.Level{doctor.Unknown}, 1, "UNKNOWN  s: w; r\n1 unknown by 9 checks; kedge runs as process 7, node n\n"},
		{[]doctor.Level{doctor.Problem, doctor.Unknown}, 3, "PROBLEM  s: w; r\nUNKNOWN  s: w; r\n1 problem, 1 unknown by 9 checks; kedge runs as process 7, node n\n"},
	} {
		p := newProgram()
		p.report = doctor.Report{Kedge: doctor.Running, PID: 7, Node: "n", Checks: 9}
		for _, l := range test.levels {
			p.report.Findings = append(p.report.Findings, finding(l))
		}
		code, out, errOut := p.run("doctor", "--config=/dev/null", "--data-dir=/d", "--run-dir=/r")
		if code != test.code || out != test.out || errOut != "" || p.fix || settings.DataDir.In(p.node.Values) != "/d" || settings.RunDir.In(p.node.Values) != "/r" {
			t.Errorf("%v: exit code %d, %q, %q, %+v", test.levels, code, out, errOut, p.node)
		}
		var got doctor.Report
		code, out, _ = p.run("doctor", "--config=/dev/null", "--fix", "-o", "json")
		if err := json.Unmarshal([]byte(out), &got); err != nil || code != test.code || !p.fix || len(got.Findings) != len(test.levels) || got.Checks != 9 {
			t.Errorf("%v: %v, exit code %d, %s", test.levels, err, code, out)
		}
	}
}
