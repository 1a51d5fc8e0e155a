package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	kubeletapis "k8s.io/kubelet/pkg/apis"
)

// checkLabel reports what the kubelet or the API would not take as a label of a node.
func checkLabel(label string) error {
	key, value, ok := strings.Cut(label, "=")
	if !ok {
		return errors.New("want KEY=VALUE")
	}
	if err := checkName(key, value); err != nil {
		return err
	}
	namespace, _, _ := strings.Cut(key, "/")
	reserved := slices.ContainsFunc([]string{"kubernetes.io", "k8s.io"}, func(domain string) bool {
		return namespace == domain || strings.HasSuffix(namespace, "."+domain)
	})
	if reserved && strings.Contains(key, "/") && !kubeletapis.IsKubeletLabel(key) {
		return fmt.Errorf("Kubernetes does not let a node give itself labels of %s; set it with \"kedge kubectl label node\"", namespace)
	}
	return nil
}

// checkTaint reports what cannot be registered as a taint.
func checkTaint(taint string) error {
	name, effect, ok := strings.Cut(taint, ":")
	key, value, _ := strings.Cut(name, "=")
	if !ok || strings.Contains(effect, ":") {
		return errors.New("want KEY=VALUE:EFFECT")
	}
	if err := checkName(key, value); err != nil {
		return err
	}
	effects := []string{string(corev1.TaintEffectNoSchedule), string(corev1.TaintEffectPreferNoSchedule), string(corev1.TaintEffectNoExecute)}
	if !slices.Contains(effects, effect) {
		return fmt.Errorf("the effect %q is none of %s", effect, strings.Join(effects, ", "))
	}
	return nil
}

// sameTaint reports whether two well-formed taints differ at most in their values, which
// the API does not take for a difference.
func sameTaint(a, b string) bool {
	parts := func(t string) (key, effect string) {
		name, effect, _ := strings.Cut(t, ":")
		key, _, _ = strings.Cut(name, "=")
		return key, effect
	}
	keyA, effectA := parts(a)
	keyB, effectB := parts(b)
	return keyA == keyB && effectA == effectB
}

func checkName(key, value string) error {
	if wrong := validation.IsQualifiedName(key); len(wrong) > 0 {
		return fmt.Errorf("the key %q cannot be: %s", key, strings.Join(wrong, "; "))
	}
	if wrong := validation.IsValidLabelValue(value); len(wrong) > 0 {
		return fmt.Errorf("the value %q cannot be: %s", value, strings.Join(wrong, "; "))
	}
	return nil
}
