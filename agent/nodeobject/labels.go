package nodeobject

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	kubeletapis "k8s.io/kubelet/pkg/apis"
)

// CheckLabel returns an error if the kubelet or the API would refuse a label of a node.
func CheckLabel(label string) error {
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
		return fmt.Errorf("nodes cannot set labels in %s on themselves; set it with \"kedge kubectl label node\"", namespace)
	}
	return nil
}

// CheckTaint returns an error if a taint is not valid for registration.
func CheckTaint(taint string) error {
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
		return fmt.Errorf("the effect %q must be one of %s", effect, strings.Join(effects, ", "))
	}
	return nil
}

// SameTaint reports whether two valid taints have the same key and effect, by which the API identifies taints.
func SameTaint(a, b string) bool {
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
		return fmt.Errorf("invalid key %q: %s", key, strings.Join(wrong, "; "))
	}
	if wrong := validation.IsValidLabelValue(value); len(wrong) > 0 {
		return fmt.Errorf("invalid value %q: %s", value, strings.Join(wrong, "; "))
	}
	return nil
}
